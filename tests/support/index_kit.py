"""File indexes of names without files."""

from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders.file_index import FileIndex, InputFolder
from tokenizer.media import folders, images


def make_index(monkeypatch, names, layout, count=1):
    """Returns the index of file names (one list per input folder) and its skipped inputs."""
    names_by_folder = [names] * count if isinstance(names[0], str) else names

    def walk(directory, flag, extensions, ignored, report):
        return (folders.FileEntry(name, 1, 2) for name in names_by_folder[int(directory)])

    monkeypatch.setattr(folders, "walk", walk)
    inputs = [InputFolder(str(i), "input_dir") for i in range(len(names_by_folder))]
    skipped = SkippedInputs(99)
    return FileIndex(layout, inputs, images.IMAGE_EXTENSIONS, skipped), skipped
