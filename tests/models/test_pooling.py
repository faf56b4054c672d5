"""States become one vector as sentence-transformers makes it, and its folders say how."""

import json

import pytest
import torch
from transformers import BertTokenizerFast

from hf_blockkd.models.loading import load_model
from hf_blockkd.models.pooling import MODES, Pooling

from ..helpers.tiny_models import tiny_bert

STATES = torch.linspace(-1, 1, 3 * 5 * 4).sin().view(3, 5, 4)
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
REFERENCE = {
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.max(0).values,
    "mean": lambda tokens: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
    "weightedmean": lambda tokens: sum((i + 1) * token for i, token in enumerate(tokens)) / sum(range(len(tokens) + 1)),
    "lasttoken": lambda tokens: tokens[-1],
}
"""Of the tokens of one text that are no padding."""


def write(folder, modules, pooling=None, **files):
    """A folder with modules of sentence-transformers, whose transformer lies in it."""
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    files = {"modules.json": listed, "1_Pooling/config.json": pooling or {}, **files}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


OLD = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
NEW = [
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
]


@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_takes_no_part(mode):
    states = STATES.masked_fill(MASK[..., None] == 0, 999.0)
    expected = torch.stack([REFERENCE[mode](own[mask == 1]) for own, mask in zip(STATES, MASK, strict=True)])
    assert torch.allclose(Pooling((mode,)).pool(states, MASK), expected, atol=1e-6)
    assert torch.allclose(Pooling((mode,)).pool(STATES)[2], expected[2], atol=1e-6)


def test_several_are_joined_in_their_order_and_normalised_together():
    vectors = Pooling(("mean", "cls"), normalize=True)(STATES, MASK)
    parts = [Pooling((mode,)).pool(STATES, MASK) for mode in ("mean", "cls")]
    assert torch.allclose(vectors, torch.nn.functional.normalize(torch.cat(parts, 1), dim=1))


def test_maps_are_pooled_over_their_places_and_half_precision_in_float32():
    maps = torch.randn(2, 4, 3, 3)
    assert torch.allclose(Pooling().pool(maps), maps.mean((2, 3)), atol=1e-6)
    states = STATES.bfloat16()
    assert torch.equal(Pooling().pool(states, MASK), Pooling().pool(states.float(), MASK))


@pytest.mark.parametrize(
    ("modules", "config", "expected"),
    [
        (OLD, {}, Pooling()),
        (OLD, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling(("cls",))),
        (OLD, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, Pooling(("cls", "mean"))),
        (NEW, {"pooling_mode": "lasttoken"}, Pooling(("lasttoken",), normalize=True)),
        (NEW, {"pooling_mode": ["mean", "cls"], "include_prompt": True}, Pooling(("mean", "cls"), normalize=True)),
    ],
)
def test_folders_of_every_version_are_read_and_written(tmp_path, modules, config, expected):
    read = Pooling.load(str(write(tmp_path / "a", modules, config, **{"sentence_bert_config.json": {"x": 1}})))
    assert read == expected
    (tmp_path / "b").mkdir()
    read.save(tmp_path / "b", 16)
    again = Pooling.load(str(tmp_path / "b"))
    assert (again, again.settings) == (read, read.settings)
    assert json.loads((tmp_path / "b" / "sentence_bert_config.json").read_text()) == {"x": 1}


def test_a_folder_without_modules_says_nothing(tmp_path):
    assert Pooling.load(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("modules", "config", "match"),
    [
        ([*OLD, ("2_Dense", "sentence_transformers.models.Dense")], {}, "made of Transformer, Pooling, Dense"),
        (OLD[:1], {}, "made of Transformer, but"),
        (OLD, {"include_prompt": False}, "leaves prompts out"),
        (OLD, {"pooling_mode": "best"}, "pooling 'best' is unknown; choose 'cls'"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, modules, config, match):
    with pytest.raises(ValueError, match=match):
        Pooling.load(str(write(tmp_path, modules, config)))


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_model_is_loaded_with_the_pooling_of_its_folder(tmp_path, inner):
    model = tiny_bert(None)
    write(tmp_path, [(inner, OLD[0][1]), OLD[1]], {"pooling_mode": "max"})
    model.save_pretrained(tmp_path / inner)
    loaded = load_model(str(tmp_path))
    assert loaded.pooling == load_model(str(tmp_path), config_only=True).pooling == Pooling(("max",))
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(loaded(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_it_is_what_the_library_computes(tmp_path, mode):
    library = pytest.importorskip("sentence_transformers", reason="needs `pip install sentence-transformers`")
    model = tiny_bert(None)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pooling = Pooling((mode,), normalize=True)
    pooling.save(tmp_path, model.config.hidden_size)
    texts = ["a b c", "d", "e f g h i j a"]
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu").encode(texts, convert_to_tensor=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = pooling(model(**batch).last_hidden_state, batch["attention_mask"])
    assert torch.allclose(ours, theirs, atol=1e-6)
