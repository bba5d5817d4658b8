"""The files of a folder as other sources: tars, parquet files, saved datasets, files of a remote file system."""

import io
import pathlib
import tarfile

import fsspec


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the contents of the files in a folder by their names, in the order of the names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def tar_bytes(files: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """Returns a tar with members of these names and contents. A member without contents is a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = tarfile.REGTYPE if data else tarfile.SYMTYPE
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(directory: pathlib.Path, files: dict[str, bytes], count: int = 2) -> list[pathlib.Path]:
    """Spreads files over tars, in reverse order, with metadata that is no image beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(files)[::-1]
    paths = [directory / f"{number:03d}.tar" for number in range(count)]
    for number, path in enumerate(paths):
        part = {name: files[name] for name in names[number::count]}
        path.write_bytes(tar_bytes({**part, f"{number}.json": b"{}"}))
        (directory / f"{number:03d}.parquet").write_bytes(b"metadata of img2dataset")
    return paths


def write_parquet(path: pathlib.Path, columns: dict[str, list], row_group_size: int = 2) -> None:
    """Writes columns of bytes or of structs."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)


def structs(files: dict[str, bytes]) -> list[dict]:
    """Returns the cells that Hugging Face writes for images."""
    return [{"bytes": data, "path": name} for name, data in files.items()]


def write_remote(url: str, files: dict[str, bytes]) -> str:
    """Writes files into a remote folder and returns its URL."""
    system, root = fsspec.url_to_fs(url)
    for name, data in files.items():
        system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{name}", data)
    return url
