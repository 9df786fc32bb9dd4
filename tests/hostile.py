"""Input as damage and malice leave it: hypothesis strategies for bytes, JSON, checkpoints, tars, images, settings.

What they draw is mostly valid, so that it gets past the first check. Every piece of code in it would, if it ran,
reach outside the folder it is read in.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import types
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

Draw = Callable[[st.SearchStrategy[Any]], Any]

# -- bytes ---------------------------------------------------------------------------------------------------------

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_EDITS = ("flip", "set", "cut", "drop", "double", "insert", "number")


@st.composite
def damaged(draw: Draw, content: bytes, *, most: int = 3) -> bytes:
    """``content`` after some edits: bits flipped, stretches overwritten, dropped or doubled, extreme numbers."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        # Most of what is worth damaging stands at the beginning.
        share = draw(st.floats(0, 1)) ** draw(st.sampled_from((1, 4)))
        at, length = int(share * len(data)), draw(st.integers(1, 64))
        edit = draw(st.sampled_from(_EDITS))
        if edit == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "set":
            data[at : at + length] = draw(st.binary(max_size=length))
        elif edit == "cut":
            del data[at:]
        elif edit == "drop":
            del data[at : at + length]
        elif edit == "double":
            data[at:at] = data[at : at + length]
        elif edit == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        else:
            size = draw(st.sampled_from((1, 2, 4, 8)))
            order = draw(st.sampled_from(("little", "big")))
            value = draw(st.sampled_from(_EXTREMES)) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, order)
    return bytes(data)


# -- names and values ----------------------------------------------------------------------------------------------

#: Names that lead elsewhere, act on a terminal, or are too much.
NAMES = (
    "a", "0000_cat", "0001_dog", "../outside", "../../outside", "/outside", "a/../../outside", "./a", "a//b", "", ".",
    "..", "\x1b]0;owned\x07", "\x1b[2J\x1b[31m", "a\nb", "a\rb", "\x9b31m", "\u202egnp.exe", "naïve", "猫", "a b",
    "-rf", "--help", "$(touch ../outside)", "`touch ../outside`", "%s%n", "{0.__class__}", "[bold]x[/bold]", "~", "~x",
    "C:\\x", "con", "a" * 300, "\ud800", "\u2028", "<script>", "| a |", "'; drop", "NaN", "null", "1e999", "0x10",
)  # fmt: skip
names = st.sampled_from(NAMES) | st.text(max_size=12)

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**30), 1e308, -0.0, 1e-320]),
    st.floats(),
    names,
)
values = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


def _places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(document, Mapping):
        for key in document:
            yield from _places(document[key], (*here, key))
    elif isinstance(document, list):
        for index in range(len(document)):
            yield from _places(document[index], (*here, index))


@st.composite
def changed(draw: Draw, document: Any) -> Any:
    """A JSON document with one to three values replaced, removed, doubled or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(_places(document))))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            if isinstance(document, dict):
                document[draw(names)] = draw(values)
            continue
        owner = document
        for step in place[:-1]:
            owner = owner[step]
        how = draw(st.sampled_from(("replace", "replace", "remove", "double", "grow")))
        if how == "replace":
            owner[place[-1]] = draw(values)
        elif how == "remove":
            del owner[place[-1]]
        elif how == "double" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[place[-1]]))
        elif isinstance(owner[place[-1]], bool):
            owner[place[-1]] = not owner[place[-1]]
        elif isinstance(owner[place[-1]], int):
            owner[place[-1]] += draw(st.sampled_from((-1, 1, 1000, 10**9, 10**18)))
    return document


@st.composite
def json_bytes(draw: Draw, document: Any) -> bytes:
    """A JSON file of a changed document, sometimes damaged as bytes too."""
    text = json.dumps(draw(changed(document)))
    how = draw(st.integers(0, 11))
    if how == 0:
        return draw(damaged(text.encode()))
    if how == 1:  # nested deeper than a parser may go, or a number of many digits
        return draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"", b"\xff\xfe", b"[1,2]"]))
    if how == 2:
        return text.replace("1", draw(st.sampled_from(["9" * 5000, "1e999", "NaN", "-0", "[" * 2000])), 1).encode()
    return text.encode()


# -- checkpoints ---------------------------------------------------------------------------------------------------


_DTYPES = ("F32", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "?", "", None)


@st.composite
def safetensors_bytes(draw: Draw, make: Callable[[], bytes]) -> bytes:
    """A safetensors file: random, a damaged whole one (of ``make``), or one whose header lies."""
    whole = make()
    how = draw(st.sampled_from(("random", "damaged", "header", "header", "header", "length")))
    if how == "random":
        return draw(st.binary(max_size=200))
    if how == "damaged":
        return draw(damaged(whole))
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    if how == "length":
        lie = draw(st.sampled_from([0, 1, size - 1, size + 1, len(whole), 2**32, 2**63, 2**64 - 1]))
        return struct.pack("<Q", lie) + whole[8:]
    header = draw(changed(header))
    if isinstance(header, dict) and draw(st.booleans()):
        entry = {
            "dtype": draw(st.sampled_from(_DTYPES)),
            "shape": draw(st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, -1]), max_size=5)),
            "data_offsets": draw(st.lists(st.sampled_from([0, 4, 8, len(body), len(body) + 8, 2**63]), max_size=3)),
        }
        header[draw(names)] = entry
    text = json.dumps(header)
    if draw(st.integers(0, 4)) == 0 and isinstance(header, dict) and header:  # the same name twice
        text = text[:-1] + ", " + json.dumps({list(header)[0]: list(header.values())[-1]})[1:]
    content = text.encode()
    return struct.pack("<Q", len(content)) + content + body


class Runs:
    """Whatever unpickles it calls ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _programs() -> list[Runs]:
    import builtins
    import os
    import pathlib
    import shutil
    import subprocess

    touch = "open('../outside', 'w')"
    return [
        Runs(os.system, "touch ../outside"), Runs(subprocess.Popen, ["touch", "../outside"]),
        Runs(builtins.eval, touch), Runs(builtins.exec, touch), Runs(os.remove, "../decoy"),
        Runs(pathlib.Path.touch, pathlib.Path("../outside")),
        Runs(shutil.rmtree, ".."), Runs(torch.hub.load, "a/b", "c"), Runs(torch.load, "../decoy", "cpu"),
        Runs(np.load, "../decoy", None, True), Runs(__import__, "this"), Runs(getattr, dict, "fromkeys"),
    ]  # fmt: skip


#: What may stand where a checkpoint has a tensor.
_ODD: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.ones(4).to_sparse(),
    "rows": lambda: torch.eye(4).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "meta": lambda: torch.empty(4, device="meta"),
    "expanded": lambda: torch.ones(1).expand(4, 10**9),
    "expanded far": lambda: torch.ones(1).expand(10**14),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "float8": lambda: torch.ones(4, dtype=torch.float8_e4m3fn),
    "with gradient": lambda: torch.ones(4).requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(torch.ones(4)),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "not finite": lambda: torch.full((16, 3, 3, 3), float("nan")),
    "empty": lambda: torch.empty(0),
    "scalar": lambda: torch.tensor(1.0),
    "overlapping": lambda: torch.ones(4).as_strided((2, 2), (0, 1)),
    "storage": lambda: torch.ones(4).untyped_storage(),
    "size": lambda: torch.Size([1]),
    "type": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "transposed": lambda: torch.ones(3, 4).t(),
    "integers": lambda: torch.tensor([2**62]),
}


@st.composite
def pickled_bytes(draw: Draw, make: Callable[[], Mapping[str, torch.Tensor]]) -> bytes:
    """A pickled checkpoint of ``make``: with code in it, odd tensors or values, or damaged; as a zip file or not."""
    state: Any = dict(make())
    how = draw(st.sampled_from(("code", "odd", "odd", "facts", "damaged", "damaged", "loop", "random")))
    if how == "random":
        return draw(st.binary(max_size=200))
    if how == "code":
        program = draw(st.sampled_from(_programs()))
        within = ({"state_dict": state, "x": program}, {**state, "x": program}, [program])
        state = draw(st.sampled_from((program, *within)))
    elif how == "odd":
        name = draw(st.sampled_from([*state, "extra"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some kinds of tensor are "in beta", others will be gone one day
            state[name] = _ODD[draw(st.sampled_from(list(_ODD)))]()
    elif how == "loop":
        state["model"] = state
        state["state_dict"] = [state]
    wrapper = draw(st.sampled_from((None, "state_dict", "model", "module")))
    if wrapper:
        state = {wrapper: state}
    if how == "facts":
        keys = ("arch", "architecture", "num_classes", "input_size", "mean", "std", "classes", "license", "args")
        state |= draw(st.dictionaries(st.sampled_from(keys), values, max_size=4))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, buffer, _use_new_zipfile_serialization=draw(st.booleans()))
    content = buffer.getvalue()
    if how != "code" and zipfile.is_zipfile(io.BytesIO(content)) and draw(st.integers(0, 5)) == 0:
        content = repacked(content, draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))))
    return draw(damaged(content)) if how == "damaged" else content


def repacked(content: bytes, method: int) -> bytes:
    """The same zip archive, its members stored or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return buffer.getvalue()


# -- images --------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@cache
def pictures() -> tuple[bytes, ...]:
    """Small whole images of several formats and modes."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    colour = Image.fromarray(noise[:, :, :3])
    palette = colour.quantize(8)
    palette.info["transparency"] = b"\x00\x80"
    deep = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    return (
        encoded(colour, "PNG"), encoded(colour, "JPEG"), encoded(colour, "WEBP"), encoded(colour, "BMP"),
        encoded(colour, "GIF"), encoded(colour, "TIFF"), encoded(Image.fromarray(noise), "PNG"),
        encoded(colour.convert("L"), "PNG"), encoded(colour.convert("LA"), "PNG"), encoded(palette, "PNG"),
        encoded(deep, "PNG"), encoded(colour.convert("1"), "PNG"), encoded(colour.convert("CMYK"), "JPEG"),
        encoded(colour, "PPM"),
    )  # fmt: skip


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 2, interlace: int = 0
) -> bytes:
    """A PNG file with a header that may lie about what is in it."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, interlace)
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + data + png_chunk(b"IEND", b"")


@cache
def black_png(side: int) -> bytes:
    """A whole grey PNG of ``side`` x ``side`` pixels: a thousandth of its size in memory."""
    packer = zlib.compressobj(9)
    row = bytes(side + 1)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


#: PostScript that would write a file, for whoever hands it to an interpreter.
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\n(../outside) (w) file closefile showpage\n%%EOF\n"
)


@st.composite
def image_bytes(draw: Draw) -> bytes:
    """An image file: whole, damaged, with a header that lies, or something else altogether."""
    how = draw(st.sampled_from(("whole", "damaged", "damaged", "damaged", "header", "chunks", "other")))
    base = draw(st.sampled_from(pictures()))
    if how == "whole":
        return base
    if how == "damaged":
        return draw(damaged(base))
    if how == "other":
        return draw(st.sampled_from([b"", POSTSCRIPT, b"<svg/>", b"GIF89a", b"\x89PNG\r\n\x1a\n", bytes(300)]))
    side = st.sampled_from([0, 1, 5, 6, 1000, 30_000, 2**31 - 1, 2**32 - 1])
    extra = []
    if how == "chunks":
        bomb = zlib.compress(bytes(2**22))
        extra = draw(
            st.lists(
                st.sampled_from([
                    png_chunk(b"iCCP", b"x\0\0" + bomb), png_chunk(b"zTXt", b"x\0\0" + bomb),
                    png_chunk(b"iTXt", b"x\0\1\0\0\0" + bomb), png_chunk(b"tRNS", bytes(5)),
                    png_chunk(b"PLTE", bytes(7)),
                    png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), png_chunk(b"gAMA", b""),
                    png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"), png_chunk(b"fcTL", bytes(26)), b"\0\0\0\x09tEXt",
                ]),
                max_size=3,
            )
        )  # fmt: skip
    width, height = (5, 6) if how == "chunks" else (draw(side), draw(side))
    return png(
        width, height, bytes(16 * 6), *extra, depth=draw(st.sampled_from((1, 2, 8, 16, 9))),
        colour=draw(st.sampled_from((0, 2, 3, 4, 6, 1))), interlace=draw(st.sampled_from((0, 1, 2))),
    )  # fmt: skip


# -- tars ----------------------------------------------------------------------------------------------------------

#: Files, links, devices, folders, pipes, GNU's long names and sparse files, PAX headers, and what nobody defined.
_TYPES = tuple(bytes([kind]) for kind in b"0000\x001234567LKSxgXZ")


def tar_number(value: int, width: int) -> bytes:
    """Octal where it fits, GNU's base 256 where not (negative and huge ones too)."""
    if 0 <= value < 8 ** (width - 1):
        return f"{value:0{width - 1}o}".encode() + b"\0"
    return (b"\x80" if value >= 0 else b"\xff") + (value % 256 ** (width - 1)).to_bytes(width - 1, "big")


def tar_member(name: bytes, content: bytes, *, size: int | None = None, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One member; ``size`` is what its header says, whatever the content's."""
    stated = len(content) if size is None else size
    fields = (
        name[:100].ljust(100, b"\0") + tar_number(0o644, 8) + tar_number(0, 8) + tar_number(0, 8)
        + tar_number(stated, 12) + tar_number(0, 12) + b" " * 8 + kind + link[:100].ljust(100, b"\0")
        + b"ustar\x0000" + bytes(32 + 32 + 8 + 8 + 155 + 12)
    )  # fmt: skip
    checksum = b"%06o\0 " % sum(fields)
    padding = bytes(-len(content) % 512)
    return fields[:148] + checksum + fields[156:] + content + padding


@st.composite
def pax_record(draw: Draw) -> bytes:
    key = draw(
        st.sampled_from([
            b"path", b"linkpath", b"size", b"mtime", b"hdrcharset", b"GNU.sparse.major", b"GNU.sparse.minor",
            b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.numblocks",
            b"GNU.sparse.offset", b"GNU.sparse.name", b"x",
        ])
    )  # fmt: skip
    value = draw(
        st.sampled_from([
            b"1", b"0", b"-1", b"-1024", b"99999999999999999999", b"1,2,3", b"a", b"", b"../../outside.png",
            b"\xff\xfe", b"1e9", b"nan", b"a/0.png", b"9" * 5000, b"1\n1\n1\n",
        ])
    )  # fmt: skip
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 2
    return (b"%d" % draw(st.sampled_from((length, length, length, 0, 3, 10**9, -5)))) + body


@st.composite
def tar_bytes(draw: Draw, images: Sequence[bytes], labels: Sequence[str], *, depth: int = 1) -> bytes:
    """A tar: members with every kind of name, type, size and header, some true and some not; whole, cut or damaged."""
    parts = []
    for index in range(draw(st.integers(0, 5))):
        folder = draw(st.sampled_from(labels))
        if draw(st.booleans()):
            parts.append(tar_member(f"{folder}/{index}.png".encode(), draw(st.sampled_from(images))))
            continue
        folder = draw(st.sampled_from([folder, *NAMES]))
        name = f"{folder}/{index}.png".encode("utf-8", "replace")
        kind = draw(st.sampled_from(_TYPES))
        content = draw(st.sampled_from(images))
        if kind in (b"x", b"g", b"X"):
            content = b"".join(draw(st.lists(pax_record(), min_size=1, max_size=3)))
        elif kind in (b"L", b"K"):
            content = draw(st.sampled_from(NAMES)).encode("utf-8", "replace") + b"\0"
        elif depth and draw(st.integers(0, 7)) == 0:
            name, content = name[:-3] + b"tar", draw(tar_bytes(images, labels, depth=depth - 1))
        lies = (None, None, None, None, 0, 1, 10**6, 2**33, 2**62, 2**80, -1, -512, -(2**40))
        link = draw(st.sampled_from((b"", b"../../decoy", b"/etc/passwd", b"a/0.png")))
        parts.append(tar_member(name, content, size=draw(st.sampled_from(lies)), kind=kind, link=link))
    content = b"".join(parts) + bytes(draw(st.sampled_from((0, 512, 1024))))
    how = draw(st.integers(0, 5))
    if how == 0:
        return draw(damaged(content)) if content else content
    return content[: draw(st.integers(0, len(content)))] if how == 1 else content


# -- settings ------------------------------------------------------------------------------------------------------

_YAML_PIECES = (
    "seed: 1", "recipe: smoke", "synthesis:", "  steps: 2", "  steps: &a 2", "  steps: *a", "- a", "? [a, b]", ": x",
    "seed: !!int", "seed: !!bool x", "seed: !!float ''", "seed: !!timestamp x", "seed: !!binary '='", "seed: 1:60:1",
    "seed: !!python/object/apply:os.system ['touch ../outside']", "seed: !!python/name:os.system", "seed: 0o17",
    "seed: 2026-13-40", "seed: 0001-01-01T00:00:00+23:59", "seed: .inf", "seed: 0b", "seed: 0x", "<<: {seed: 3}",
    "<<: [1]", "seed: !!set {a, b}", "seed: !!omap [a: 1]", "seed: !!pairs [a]", "%YAML 9.9", "---", "...", "\t- x",
    "seed: 'a", 'seed: "\\x', "seed: |", "  text", "seed: [", "config: {seed: 1}", "config: 3", "\x00", "\x1b[31m: 1",
    "distillation: {lr: 1e-3}", "distillation: 3", "seed: 1_000", "seed: +1", "schedule: {time_budget: 1h}", "~: ~",
    "lr_latent: 0.1", "null: 1", "1: 2", "true: false", "[]: 1", "{}: 1", "a: *nothing", "&a a: *a",
)  # fmt: skip


def yaml_bomb(kind: str) -> str:
    """A few hundred bytes that are a billion values when they are written out."""
    if kind == "aliases":
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    else:
        lines = ["a0: &a0 {b: 1}"]
        lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    return "\n".join([*lines, "seed: *a9"])


@st.composite
def config_bytes(draw: Draw, document: Mapping[str, Any]) -> bytes:
    """A config file: pieces of YAML that hardly go together, or a whole one changed, as JSON or YAML."""
    if draw(st.booleans()):
        text = "\n".join(draw(st.lists(st.sampled_from(_YAML_PIECES), max_size=5)))
        return draw(damaged(text.encode())) if text and draw(st.integers(0, 4)) == 0 else text.encode()
    return draw(json_bytes(document))


#: Numbers that a setting of that kind may well have, or that are too much for it.
_WHOLE = (0, 1, 2, 3, 5, 8, 64, 1000, 10**5, 10**9, 2**31, 2**62, 10**30, -1)
_REAL = (0.0, 1e-30, 1e-9, 0.01, 0.1, 0.5, 0.99, 1.0, 2.0, 20.0, 1e6, 1e30, 1e300, -1.0)


def _meant(kind: Any) -> tuple[Any, ...]:
    """Values of a field's type."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return tuple(value for option in typing.get_args(kind) for value in _meant(option))
    return {int: _WHOLE, float: _REAL, bool: (True, False), str: NAMES}.get(kind, (None, "none"))


@st.composite
def assignment(draw: Draw, kinds: Mapping[str, Any]) -> str:
    """What may stand after ``--set``, given the type of each key; most of it could be meant."""
    if draw(st.integers(0, 7)):
        key = draw(st.sampled_from(list(kinds)))
        value = draw(st.sampled_from(_meant(kinds[key])))
        return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
    key = draw(st.sampled_from([*kinds, *(key.rpartition(".")[2] for key in kinds), *NAMES]))
    value = draw(values)
    text = value if isinstance(value, str) else json.dumps(value) if draw(st.booleans()) else str(value)
    return f"{key}{draw(st.sampled_from(('=', '=', '==', '', ' = ')))}{text}"


def typed(text: str) -> str:
    """``text`` as a shell can pass it: no NUL, and what UTF-8 cannot say as the bytes it came from."""
    return "".join("\udcff" if 0xD800 <= ord(char) <= 0xDFFF else char for char in text.replace("\0", ""))
