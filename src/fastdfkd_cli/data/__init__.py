"""Real images for evaluation and training: where they lie, what their classes are, and how a model is fed with them.

::

    files.py      image files in folders and tars, read in place (also what `dataset` reads plain images with)
    sources.py    a folder, a tar, the built-in digits or a data set by name -> EvaluationData
    sets.py       EvaluationData: images, their classes, and how these match a model's
    views.py      pictures -> batches, preprocessed for one or more models

What timm's ``validate.py`` opens, this opens, with the same preprocessing (``timm.data.create_transform``), the same
natural order of class folders (``class2`` before ``class10``) and the same search for a split's folder. It is stricter
where timm goes on in silence: an image that cannot be read is an error and not replaced by its neighbour, a folder of
splits is never read as one, and the data's classes must be the model's.

Images leave here as uint8 ``[B, C, H, W]``; the model's own wrapper normalises them.
"""

from __future__ import annotations

from fastdfkd_cli.data.sets import EvaluationData, evaluation_input, picture_size
from fastdfkd_cli.data.sources import BUILTIN_DIGITS, open_evaluation_data, open_training_data
from fastdfkd_cli.data.views import Source

__all__ = [
    "BUILTIN_DIGITS",
    "EvaluationData",
    "Source",
    "evaluation_input",
    "open_evaluation_data",
    "open_training_data",
    "picture_size",
]
