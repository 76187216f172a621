"""Packed files that are not sound, for fuzz.py, packed_stress.py and the tests: damaged at random, or forged with checksums that fit."""

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

ODD = [0, 1, 2, -1, 3, 7, 31, 255, 10**6, 2**31, 2**40, 2**62, 10**30, None, "", "a", "tensor", "channel", "extents", "groups", "coded"]
ODD += [
    "middle",
    "plain",
    "none",
    "float",
    "float64",
    "bfloat16",
    "F16",
    "U8",
    "BOOL",
    "\x1b[2J",
    "\ud800",
    True,
    1.5,
    [],
    {},
    [1],
    [[0, 0, 1]],
    [0] * 5,
]
"""What a forged header may say in any place."""


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes that differ from a sound file's: some removed, added, replaced, zeroed, swapped, or the end cut off."""
    while True:
        damaged, start, count = bytearray(data), draw.randrange(len(data)), draw.choice((1, 1, 2, 4, 8, 64, 500))
        match draw.randrange(6):
            case 0:
                del damaged[start : start + count]
            case 1:
                damaged[start:start] = draw.randbytes(count)
            case 2:
                damaged[start : start + count] = draw.randbytes(len(damaged[start : start + count]))
            case 3:
                damaged[start : start + count] = bytes(len(damaged[start : start + count]))
            case 4:
                other = draw.randrange(len(data))
                damaged[start], damaged[other] = damaged[other], damaged[start]
            case 5:
                del damaged[start:]
        if damaged != data:
            return bytes(damaged)


CONTENTS, CHECKSUM = "diffq_fx/contents", "diffq_fx/header_crc32"
RAW_DEFLATE = -15


class Forgery:
    """A file taken apart, to be put together with other values and checksums that fit."""

    def __init__(self, data: bytes) -> None:
        length = struct.unpack("<Q", data[:8])[0]
        self.body_start = 8 + length
        self.header = json.loads(data[8 : self.body_start])
        self._own = {name: self.header[name] for name in (CONTENTS, CHECKSUM)}
        start, stop = self._own[CONTENTS]["data_offsets"]
        self.body = bytearray(data[self.body_start : self.body_start + start])
        self.contents = json.loads(zlib.decompress(data[self.body_start + start : self.body_start + stop], RAW_DEFLATE))

    def build(self, packed: bytes | None = None) -> bytes:
        """The file, its contents as they are or as these bytes; their place and that of the checksum follow, where they are not forged."""
        if packed is None:
            coder = zlib.compressobj(wbits=RAW_DEFLATE)
            packed = coder.compress(json.dumps(self.contents).encode()) + coder.flush()
        stop = len(self.body) + len(packed)
        places = {
            CONTENTS: {"dtype": "U8", "shape": [len(packed)], "data_offsets": [len(self.body), stop]},
            CHECKSUM: {"dtype": "U8", "shape": [4], "data_offsets": [stop, stop + 4]},
        }
        header = self.header | {name: place for name, place in places.items() if self.header.get(name) is self._own[name]}
        text = json.dumps(header).encode()
        head = struct.pack("<Q", len(text)) + text
        return head + self.body + packed + struct.pack("<I", zlib.crc32(head + packed))

    def replace(self, name: str, data: bytes) -> None:
        """Give a tensor of bytes other ones, and all behind it their new places."""
        start, stop = self.header[name]["data_offsets"]
        self.body[start:stop] = data
        for other, entry in self.header.items():
            if other not in ("__metadata__", CONTENTS, CHECKSUM) and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [at + len(data) - (stop - start) for at in entry["data_offsets"]]
        self.header[name] |= {"shape": [len(data)], "data_offsets": [start, start + len(data)]}

    def fix_checksums(self) -> None:
        """Those of the body, of whatever the header still describes."""
        crc = 0
        places = {name: entry["data_offsets"] for name, entry in self.header.items() if name not in ("__metadata__", CONTENTS, CHECKSUM)}
        for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
            part = self.body[start:stop]
            if name.startswith("diffq_fx/shard/"):
                self.contents["shards"][int(name.rpartition("/")[2])]["crc32"] = zlib.crc32(part)
            elif name.startswith("diffq_fx/common/"):
                self.contents["weights"][int(name.rpartition("/")[2])]["common_crc32"] = zlib.crc32(part)
            elif name == "diffq_fx/small":
                self.contents["small_section"][1] = zlib.crc32(part)
            else:
                crc = zlib.crc32(part, crc)
        self.contents["tensors_crc32"] = crc


def forge_header(data: bytes, draw: random.Random) -> bytes:
    """A file with some values in its header replaced by others, under checksums that fit."""
    forgery = Forgery(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        change_value(forgery.contents if draw.random() < 0.7 else forgery.header, draw, skip=("__metadata__",))
    return forgery.build()


def forge_body(data: bytes, draw: random.Random) -> bytes:
    """A file with other bytes under checksums that fit."""
    forgery = Forgery(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        forgery.body[draw.randrange(len(forgery.body))] ^= draw.randrange(1, 256)
    forgery.fix_checksums()
    return forgery.build()


def forge_section(data: bytes, draw: random.Random, mutate: Callable[[bytes], bytes]) -> bytes:
    """A file with one section of one shard, or its small tensors, made anew by ``mutate``; all sizes and checksums fit."""
    forgery = Forgery(data)
    names = [name for name in forgery.header if name.startswith(("diffq_fx/shard/", "diffq_fx/small"))]
    name = draw.choice(names)
    start, stop = forgery.header[name]["data_offsets"]
    part = bytes(forgery.body[start:stop])
    if name.endswith("small"):
        size = forgery.contents["small_section"][0]
        changed = mutate(part[:size])
        forgery.contents["small_section"][0] = len(changed)
        forgery.replace(name, changed + part[size:])
    else:
        sections = forgery.contents["shards"][int(name.rpartition("/")[2])]["sections"]
        which = draw.choice([place for place, size in enumerate(sections) if size] or [0])
        first = sum(sections[:which])
        changed = mutate(part[first : first + sections[which]])
        forgery.replace(name, part[:first] + changed + part[first + sections[which] :])
        sections[which] = len(changed)
    forgery.fix_checksums()
    return forgery.build()


def change_value(root: Any, draw: random.Random, skip: tuple[str, ...] = ()) -> None:
    """One value in nested lists and dicts becomes an odd one, a near one or one from elsewhere; or it goes, or comes twice."""
    paths = [path for path in _paths(root) if path[0] not in skip]
    if not paths:
        return
    *path, last = draw.choice(paths)
    holder = _at(root, path)
    match draw.randrange(6):
        case 0 if type(holder[last]) is int:
            holder[last] += draw.choice((-1, 1, 8, 255))
        case 1:
            holder[last] = copy.deepcopy(_at(root, draw.choice(paths)))
        case 2 if isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        case 3 if path:
            del holder[last]
        case _:
            holder[last] = copy.deepcopy(draw.choice(ODD))


def _at(root: Any, path: tuple | list) -> Any:
    for key in path:
        root = root[key]
    return root


def _paths(value, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested lists and dicts."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _paths(each, (*path, key))
