"""Files whose checksums are right and whose content is not: an error, never a crash."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mono_quant import (
    CheckpointError,
    FittedCodebook,
    PerGroup,
    Quantizer,
    UnknownKindError,
    load_model,
)
from tests.helpers import TiedModel
from tests.serializers.files import SUFFIXES, Edit, Header, forge, read, small, write

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def record(header: Header, name: str = "0.weight") -> Header:
    """Return the header's entry of a weight."""
    records = header["records"]
    assert isinstance(records, dict)
    found: Header = records[name]
    return found


def said(**values: object) -> Edit:
    """Return an edit that changes the entry of the first weight."""
    return lambda header, _: record(header).update(values)


def scheme(**values: object) -> Edit:
    """Return an edit that changes the scheme of the first weight."""

    def edit(header: Header, _: dict[str, Tensor]) -> None:
        found = record(header)["scheme"]
        assert isinstance(found, dict)
        found.update(values)

    return edit


def whole(**values: object) -> Edit:
    """Return an edit that changes the header itself."""
    return lambda header, _: header.update(values)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Return an edit that changes a tensor."""

    def edit(_: Header, tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return edit


def _without(name: str) -> Edit:
    def edit(header: Header, tensors: dict[str, Tensor]) -> None:
        header.pop(name)

    return edit


FORGERIES: dict[str, Edit] = {
    # the first weight is 16 x 64, 4 bits, one group a row: codes [1, 16, 32], scale [1, 16, 1]
    "stack too large": said(stack=[1, 16, 128]),
    "stack of other rows": said(stack=[1, 32, 32]),
    "stack without groups": said(stack=[16, 64]),
    "stack of four": said(stack=[1, 1, 16, 64]),
    "stack beyond memory": said(stack=[1, 1 << 40, 1 << 40]),
    "stack of nothing": said(stack=[]),
    "stack of zeros": said(stack=[0, 0, 0]),
    "negative sizes": said(stack=[1, -16, -64]),
    "sizes of text": said(stack=["1", "16", "64"]),
    "sizes with a fraction": said(stack=[1, 16.0, 64]),
    "native too large": said(native=[16, 128]),
    "native beyond memory": said(native=[1 << 62, 1 << 62]),
    "native beyond numbers": said(native=[10**30]),
    "split of other sizes": said(split=[1, 16, 32]),
    "split of one": said(split=[1024]),
    "order out of range": said(order=[0, 1, 5]),
    "order that repeats": said(order=[0, 1, 1]),
    "order too short": said(order=[0, 1]),
    "a dtype that is none": said(dtype="save"),
    "a dtype of no float": said(dtype="int8"),
    "a dtype of nothing": said(dtype=None),
    "no codes": said(tensors=["scale", "zero_point"]),
    "no tensors": said(tensors=[]),
    "tensors that are not there": said(tensors=["codes", "scale", "zero_point", "ghost"]),
    "tensors of numbers": said(tensors=[1, 2]),
    "a module of another name": said(module=3),
    "a layer that is none": said(layer="linear"),
    "another width": scheme(bits=3),
    "a width that is none": scheme(bits=99),
    "a width of text": scheme(bits="4"),
    "an unknown field": scheme(colour="red"),
    "a scheme that is an observer": scheme(kind="minmax"),
    "groups that do not divide": scheme(granularity={"kind": "per_group", "size": 7}),
    "groups of none": scheme(granularity={"kind": "per_group", "size": 0}),
    "a granularity that is none": scheme(granularity="rows"),
    "a granularity that is a scheme": scheme(granularity={"kind": "float_cast"}),
    "another granularity": scheme(granularity={"kind": "per_tensor"}),
    "a scale dtype that is none": scheme(scale_dtype="Tensor"),
    "codes of other length": tensor("0.weight.codes", lambda x: x[..., :-1].clone()),
    "codes of other rows": tensor("0.weight.codes", lambda x: x[:, :3].clone()),
    "codes of another dtype": tensor("0.weight.codes", lambda x: x.to(torch.int64)),
    "codes of floats": tensor("0.weight.codes", lambda x: x.to(torch.float32)),
    "a scale of other rows": tensor("0.weight.scale", lambda x: x[:, :3].clone()),
    "a flat scale": tensor("0.weight.scale", lambda x: x.flatten()),
    "a scale of integers": tensor("0.weight.scale", lambda x: x.to(torch.int32)),
    "a zero point of floats": tensor("0.weight.zero_point", lambda x: torch.ones(1, 16, 1)),
    "codes where zero points are floats": scheme(float_zero_point=True),
    "no zero point": said(tensors=["codes", "scale"]),
    "a symmetric grid of float zero points": scheme(symmetric=True, float_zero_point=True),
    "a short zero point": tensor("0.weight.zero_point", lambda x: x[:3].clone()),
    "an empty zero point": tensor("0.weight.zero_point", lambda x: x[:0].clone()),
    "a zero point of other dimensions": tensor("0.weight.zero_point", lambda x: x[None, None]),
    "no records": _without("records"),
    "no ties": _without("ties"),
    "no checksums": _without("checksums"),
    "no containers": _without("containers"),
    "records in a list": whole(records=[]),
    "records of texts": whole(records={"0.weight": "codes"}),
    "checksums in a list": whole(checksums=[]),
    "checksums of nothing": whole(checksums={}),
    "checksums of what is not there": whole(checksums={"ghost": 0}),
    "ties of numbers": whole(ties={"0.weight": 3}),
    "a tie to nothing": whole(ties={"0.weight": "ghost"}),
    "a tie to itself": whole(ties={"0.weight": "0.weight", "ghost": "ghost"}),
    "ties in a circle": whole(ties={"0.weight": "2.weight", "2.weight": "0.weight"}),
    "transient of numbers": whole(transient=[3]),
    "no activations": _without("applied"),
    "activations in a list": whole(applied=["1"]),
    "activations of numbers": whole(applied={"1": 0}),
    "containers of texts": whole(containers=["transformer_encoder"]),
    "a config of text": whole(config="all"),
    "a summary of infinity": whole(summary={"ratio": math.inf}),
    "a summary of NaN": whole(summary={"ratio": math.nan}),
}


@each_suffix
@pytest.mark.parametrize("edit", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_file_is_refused_by_name(edit: Edit, suffix: str, tmp_path: Path) -> None:
    path = Quantizer().bits(4).only("*").apply(small()).save(tmp_path / f"model{suffix}")
    forge(path, edit)
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path)
    skeleton = small()
    before = {name: id(tensor) for name, tensor in skeleton.named_parameters()}
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path, skeleton)
    assert before == {name: id(tensor) for name, tensor in skeleton.named_parameters()}


@each_suffix
def test_an_unforged_file_is_not_refused(suffix: str, tmp_path: Path) -> None:
    """The forger itself breaks nothing."""
    path = Quantizer().bits(4).only("*").apply(small()).save(tmp_path / f"model{suffix}")
    forge(path, lambda *_: None)
    load_model(path, small())


@each_suffix
@pytest.mark.parametrize("kind", ["nonsense", "", None, 3, "builtins.eval", "os.system"])
def test_an_unknown_kind_is_refused_with_the_way_to_make_it_known(
    kind: object, suffix: str, tmp_path: Path
) -> None:
    path = Quantizer().bits(4).apply(small()).save(tmp_path / f"model{suffix}")
    forge(path, scheme(kind=kind))
    with pytest.raises(UnknownKindError, match=rf"{path.name}.*kinds="):
        load_model(path)


@each_suffix
def test_a_layer_of_an_unknown_kind_is_read_by_the_one_that_knows_it(
    suffix: str, tmp_path: Path
) -> None:
    path = Quantizer().bits(4).apply(small()).save(tmp_path / f"model{suffix}")
    forge(path, said(layer={"kind": "nonsense"}))
    assert load_model(path, small())


@each_suffix
def test_a_deep_header_is_refused(suffix: str, tmp_path: Path) -> None:

    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    texts, tensors = read(path)
    texts["header"] = "[" * 100_000 + "]" * 100_000
    texts["header_checksum"] = str(zlib.crc32(texts["header"].encode()))
    write(path, texts, tensors)
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path)


@each_suffix
@pytest.mark.parametrize("key", ["embedding.weight", "middle.weight", "head.weight"])
def test_a_tie_of_unequal_layers_is_refused(key: str, suffix: str, tmp_path: Path) -> None:
    """One weight cannot be read in two ways."""
    path = Quantizer().bits(4).only("*").apply(TiedModel()).save(tmp_path / f"model{suffix}")

    def edit(header: Header, _: dict[str, Tensor]) -> None:
        record(header, key)["stack"] = [1, 32, 128]

    forge(path, edit)
    with pytest.raises(CheckpointError):
        load_model(path, TiedModel())


UNREADABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x.flatten()[0].expand(x.shape),
    "enormous": lambda x: x.flatten()[:1].expand(1 << 40),
    "transposed": lambda x: x.movedim(-1, 0),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("name", ["0.weight.codes", "0.weight.scale", "1.running_mean"])
def test_tensors_that_are_not_plain_memory_are_refused_or_right(
    name: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """A checksum that trusts the shape of such a tensor would read memory that is not its own."""
    path = Quantizer().bits(4).only("*").apply(small()).save(tmp_path / "model.pt")
    key = name.removesuffix(".codes").removesuffix(".scale")
    expected = load_model(path)[key]
    texts, tensors = read(path)
    tensors[name] = change(tensors[name])
    write(path, texts, tensors)
    try:
        found = load_model(path)[key]
    except CheckpointError:
        with pytest.raises(CheckpointError, match=path.name):
            load_model(path, small())
    else:
        assert type(found) is type(expected)


@pytest.mark.parametrize("value", [3, None, "text", [1, 2], {}, torch.Size([2])], ids=repr)
def test_what_is_no_tensor_is_refused(value: object, tmp_path: Path) -> None:
    path = Quantizer().bits(4).apply(small()).save(tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    for name in ("0.weight.codes", "2.bias"):
        torch.save({**content, "tensors": {**content["tensors"], name: value}}, path)
        with pytest.raises(CheckpointError, match=path.name):
            load_model(path)
    torch.save({**content, "tensors": value}, path)
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path)


def tabled(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return tensor(f"0.weight.{name}", change)


TABLES: dict[str, Edit] = {
    # the first weight is 16 x 64, 4 bits, four groups a row: codes [1, 16, 32], scale [1, 16, 4]
    "no table": said(tensors=["codes", "scale", "global_scale"]),
    "no global scale": said(tensors=["codes", "scale", "levels"]),
    "no scale": said(tensors=["codes", "levels", "global_scale"]),
    "a longer table": tabled("levels", lambda x: torch.cat([x, x])),
    "a shorter table": tabled("levels", lambda x: x[:8].clone()),
    "a table of another dtype": tabled("levels", lambda x: x.to(torch.float64)),
    "a table of NaN": tabled("levels", lambda x: x * torch.nan),
    "an infinite global scale": tabled("global_scale", lambda x: x / 0),
    "two global scales": tabled("global_scale", lambda x: torch.cat([x, x])),
    "a scale of another dtype": tabled("scale", lambda x: x.to(torch.float32)),
    "a scale of bytes": tabled("scale", lambda x: x.view(torch.uint8)),
    "another width": scheme(bits=3),
    "scales of another dtype": scheme(scale_dtype="float16"),
    "another kind": scheme(kind="affine"),
    "an unknown table": scheme(kind="codebook", levels="nf5"),
}


@each_suffix
@pytest.mark.parametrize("edit", TABLES.values(), ids=TABLES)
def test_forged_tables_are_refused_by_name(edit: Edit, suffix: str, tmp_path: Path) -> None:
    grid = FittedCodebook(4, PerGroup(16), torch.float8_e4m3fn)
    path = Quantizer().scheme(grid).only("*").apply(small()).save(tmp_path / f"model{suffix}")
    load_model(path, small())
    forge(path, edit)
    with pytest.raises(CheckpointError, match=path.name):
        load_model(path, small())
