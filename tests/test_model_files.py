"""Which models files make: shards, ids and projectors, without a file on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from supervisor.models.folder_scan import ModelFile, show
from supervisor.models.gguf import Header
from supervisor.models.model_files import Model, build_models, group_shards, name_groups, plain_name

HEADER = Header(
    version=3,
    architecture="llama",
    name=None,
    general_type="model",
    context_length=2048,
    block_count=1,
    embedding_length=256,
    head_count=8,
    head_count_kv=2,
    key_length=None,
    value_length=None,
    vocab_size=3,
    file_type=15,
    quantization="Q4_K_M",
    chat_template=None,
    tensor_count=2,
    parameter_count=100,
    split_count=1,
    split_no=0,
    metadata={},
)
PROJECTOR = replace(HEADER, architecture="clip", general_type="mmproj", quantization="F16")


def file(path: str, header: Header | None = HEADER, error: str | None = None, *, copying: bool = False) -> ModelFile:
    """Return a file of 10 bytes at `path`, relative to the models folder."""
    return ModelFile(Path("m", path), PurePosixPath(path).parent, 10, 10**9, 7, header, error, copying)


def shard(path: str, number: int, count: int) -> ModelFile:
    name = f"{path}-{number:05d}-of-{count:05d}.gguf"
    architecture = "llama" if number == 1 else None
    return file(name, replace(HEADER, architecture=architecture, split_no=number - 1, split_count=count))


def build(*files: ModelFile) -> dict[str, Model]:
    return build_models(files)[0]


def ids(*paths: str) -> dict[str, str]:
    """Return the id of each path."""
    named = name_groups(group_shards(map(file, paths)))
    return {group.files[0].path.relative_to("m").as_posix(): id for id, group in named.items()}


def test_id_is_the_stem() -> None:
    assert ids("A.Q4_1.gguf", "sub/b.GGUF") == {"A.Q4_1.gguf": "A.Q4_1", "sub/b.GGUF": "b"}


def test_the_file_nearest_to_the_root_keeps_the_stem() -> None:
    assert ids("z/x.gguf", "a/b/x.gguf", "b/x.gguf") == {
        "b/x.gguf": "x",
        "z/x.gguf": "z/x",
        "a/b/x.gguf": "a/b/x",
    }
    assert ids("b/x.gguf", "x.gguf") == {"x.gguf": "x", "b/x.gguf": "b/x"}


def test_ids_are_unique_whatever_the_names() -> None:
    assert ids("x.GGUF", "x.gguf", "x-00001-of-00001.gguf") == {
        "x-00001-of-00001.gguf": "x",
        "x.GGUF": "x~2",
        "x.gguf": "x~3",
    }
    assert ids("auto.gguf", "sub/auto.gguf") == {"auto.gguf": "auto~2", "sub/auto.gguf": "sub/auto"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name é 漢.gguf", "plain name é 漢.gguf"),
        ("a\nb\tc", "a%0Ab%09c"),
        ("bad\udcff\udc80", "bad%FF%80"),
        ("half\ud800", "half%ED%A0%80"),
        ("\u202etxt", "%E2%80%AEtxt"),
    ],
)
def test_odd_names_are_shown_safely(name: str, shown: str) -> None:
    assert show(name) == shown
    assert list(build(file(f"{name}.gguf"))) == [show(name)]
    json.dumps(list(build(file(f"{name}.gguf"))), ensure_ascii=False).encode()


def test_shards_make_one_model() -> None:
    models = build(shard("sub/x", 2, 2), shard("sub/x", 1, 2))
    (model,) = models.values()
    assert (model.id, model.error, model.size) == ("x", None, 20)
    assert model.path == Path("m/sub/x-00001-of-00002.gguf")
    assert [path.name for path in model.files] == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    assert model.header is not None
    assert (model.header.parameter_count, model.header.tensor_count) == (200, 4)
    assert len(model.fingerprint) == 2


def test_missing_shards_are_named() -> None:
    model = build(shard("x", 2, 3))["x"]
    assert model.error == "shards are missing: x-00001-of-00003.gguf, x-00003-of-00003.gguf"
    assert "00004-of-99999.gguf and more" in str(build(shard("x", 1, 99999))["x"].error)


def test_a_broken_shard_is_named() -> None:
    broken = replace(shard("x", 2, 2), header=None, error="truncated")
    assert build(shard("x", 1, 2), broken)["x"].error == "x-00002-of-00002.gguf: truncated"


def test_shards_under_wrong_names_are_refused() -> None:
    alone = replace(shard("x", 2, 3), path=Path("m/y.gguf"))
    assert build(alone)["y"].error == "y.gguf is one of several shards: its name must end in -00002-of-00003.gguf"
    first, second = shard("x", 1, 2), shard("x", 2, 2)
    swapped = replace(first, header=second.header), replace(second, header=first.header)
    assert "must end in -00002-of-00002.gguf" in str(build(*swapped)["x"].error)


def test_impossible_shard_numbers_are_plain_names() -> None:
    names = ["x-00000-of-00002.gguf", "x-00003-of-00002.gguf", "x-1-of-2.gguf", "-00001-of-00001.gguf"]
    assert ids(*names) == {name: name.removesuffix(".gguf") for name in names}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (replace(HEADER, general_type="adapter"), "LoRA"),
        (replace(HEADER, general_type="imatrix", architecture=None), "importance matrix"),
        (replace(HEADER, tensor_count=0), "vocabulary"),
        (replace(HEADER, architecture=None), "no architecture"),
    ],
)
def test_files_that_are_no_models_are_invalid(header: Header, reason: str) -> None:
    assert reason in str(build(file("x.gguf", header))["x"].error)


def test_one_broken_file_leaves_the_rest_alone() -> None:
    models = build(file("bad.gguf", None, "empty file"), file("good.gguf"))
    assert {id: model.error for id, model in models.items()} == {"bad": "empty file", "good": None}
    assert models["bad"].header is None


def test_a_file_being_copied_is_not_offered_but_keeps_its_name() -> None:
    assert list(build(file("x.gguf", None, copying=True), file("sub/x.gguf"))) == ["sub/x"]
    assert build(shard("x", 1, 2), replace(shard("x", 2, 2), header=None, copying=True)) == {}


@pytest.mark.parametrize(
    "stem",
    [
        "Gemma-3-4b-it-Q4_K_M",
        "gemma_3_4b_it.IQ4_XS",
        "gemma-3-4b-it-UD-Q4_K_XL",
        "gemma-3-4b-it.i1-Q6_K",
        "mmproj-gemma-3-4b-it-f16",
        "gemma-3-4b-it-mmproj-BF16",
        "gemma-3-4b-it.mmproj-Q8_0",
        "gemma-3-4b-it-F16-mmproj",
        "mmproj-gemma-3-4b-it",
        "gemma-3-4b-it-fp16",
        "gemma-3-4b-it-MXFP4_MOE",
    ],
)
def test_names_are_compared_without_quantization(stem: str) -> None:
    assert plain_name(stem) == "gemma-3-4b-it"


def test_a_projector_in_a_subfolder_goes_to_every_model_there() -> None:
    models = build(
        file("a.gguf"), file("vl/b.gguf"), file("vl/c.gguf"), file("vl/mmproj-F16.gguf", PROJECTOR), file("vl/d/e.gguf")
    )
    assert {id for id, model in models.items() if model.mmproj} == {"b", "c"}
    assert models["b"].mmproj == Path("m/vl/mmproj-F16.gguf")
    assert len(models["b"].fingerprint) == 2
    assert len(models["b"].files) == 1


def test_a_projector_in_the_root_goes_to_its_namesake() -> None:
    models = build(
        file("gemma-3-4b-Q4_K_M.gguf"),
        shard("gemma-3-4b-Q8_0", 1, 1),
        file("other.gguf"),
        file("mmproj-gemma-3-4b-f16.gguf", PROJECTOR),
        file("mmproj-F16.gguf", PROJECTOR),
    )
    assert {id for id, model in models.items() if model.mmproj} == {"gemma-3-4b-Q4_K_M", "gemma-3-4b-Q8_0"}


def test_a_projector_is_known_by_its_header() -> None:
    models = build(file("vl/b.gguf"), file("vl/eyes.gguf", PROJECTOR))
    assert {id: model.mmproj for id, model in models.items()} == {"b": Path("m/vl/eyes.gguf")}


def test_of_several_projectors_the_best_is_taken() -> None:
    projectors = [
        file("vl/mmproj-BF16.gguf", replace(PROJECTOR, quantization="BF16")),
        file("vl/mmproj-F16.gguf", PROJECTOR),
        file("vl/mmproj-b-F32.gguf", replace(PROJECTOR, quantization="F32")),
        file("vl/mmproj-broken.gguf", None, "empty file"),
        file("vl/mmproj-copying.gguf", None, copying=True),
    ]
    models, problems = build_models([file("vl/a.gguf"), file("vl/b.gguf"), *projectors])
    assert models["a"].mmproj == Path("m/vl/mmproj-F16.gguf")
    assert models["b"].mmproj == Path("m/vl/mmproj-b-F32.gguf")
    assert problems == ["projector m/vl/mmproj-broken.gguf is not used: empty file"]
