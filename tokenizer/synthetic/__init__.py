"""Synthetic data: rendered scenes with exact annotations, and crops of photographs, as functions of a seed.

May import: tokenizer.media; no JAX, because worker processes import these modules.
Import the modules as namespaces: `from tokenizer.synthetic import scenes`.

    scenes       images, annotations and clips of rendered scenes
    layouts      random arrangements of solids; SPLITS, the styles of held-out scenes
    geometry     solids and ray tracing
    palette      64 colours, and images that consist of them
    photos       crops of photographs from installed packages, and colour augmentation
    seed_ranges  which seeds are for training and which are held out

Vocabulary: a scene is an image of one to four solids with its annotations (segmentation, depth, normals, edges); a clip
is a scene over several frames; both are rendered from a layout. A split is a set of held-out scenes. Its seeds differ
from those of training; in all splits but "scenes", shapes, colours or backgrounds differ too.

Shapes: S side of an image in pixels, P rays.
"""

from tokenizer.synthetic.layouts import SPLITS

__all__ = ["SPLITS"]
