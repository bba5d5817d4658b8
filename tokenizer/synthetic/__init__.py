"""Synthetic data: rendered scenes with exact annotations, and crops of photographs, as functions of a seed.

May import: tokenizer.media; no JAX. Import the modules as namespaces: `from tokenizer.synthetic import scenes`.

    scenes       images, annotations and clips of rendered scenes
    layouts      which solids stand where; SPLITS, the styles of held-out scenes
    geometry     solids, and where rays meet them
    photos       crops of photographs from installed packages, and colour augmentation
    seed_ranges  which seeds are for training and which are held out

Vocabulary: a scene is an image of one to four solids with its annotations (segmentation, depth, normals, edges); a clip
is a scene over several frames; a layout is what both are rendered from. A split is a kind of scenes that training does
not show: the seeds differ, and in all but "scenes" shapes, colours or backgrounds too.

Shapes: S side of an image in pixels, P rays.
"""

from tokenizer.synthetic.layouts import SPLITS

__all__ = ["SPLITS"]
