"""A labelled synthetic image set on disk: what ``synthesize`` writes and ``distill --data-dir`` reads.

::

    DIR/
      manifest.json             config, teacher, counts per class, files with sizes and SHA-256
      classes.txt               the class folders in index order, one a line: timm's --class-map
      train-00000.tar           0003_cat/00000012.png ...: lossless, the number is the image's place in the set
      train-00000.safetensors   "logits" [n, classes] of the teacher for the image as stored; "labels" int64 [n];
                                both in the tar's order
      grids/0003_cat.png        a look at each class
      state/                    what the program needs to go on (only for itself)

timm opens a shard as it is, ``create_dataset("", root="DIR/train-00000.tar")``, and all of them with
``ImageDataset(DIR, reader=ReaderImageInTar(DIR))``. It numbers the class folders that it finds, in their order: right
as long as every class has an image in what it opens. ``class_map="DIR/classes.txt"`` makes the numbers right always.
(``create_dataset("", root="DIR")`` looks for image files, not for tars, and would find the pictures in ``grids/``.)

A shard counts once the manifest names it. The manifest is replaced only when the shard's files are whole, under
temporary names (``.train-00000.tar.partial``) that a resumed run completes or drops.

In this package::

    layout.py  what the files are called, the manifest's checks
    grids.py   a picture per class
    parts.py   a set made in parts, by several processes or jobs, and put together
    writer.py  DatasetWriter: shards, interruption and going on
    reader.py  read_dataset: such a set, or anybody's images, in memory
"""

from __future__ import annotations

from fastdfkd_cli.dataset.layout import class_folders, load_manifest
from fastdfkd_cli.dataset.reader import SyntheticSet, read_dataset
from fastdfkd_cli.dataset.writer import DatasetWriter, ResumeState

__all__ = [
    "DatasetWriter",
    "ResumeState",
    "SyntheticSet",
    "class_folders",
    "load_manifest",
    "read_dataset",
]
