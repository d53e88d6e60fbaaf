"""``inputs_embeds`` of an engine that was built to take them: logits and tokens equal transformers'."""

import gc

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cases.tiny import FAMILIES, WINDOWED, run_alone
from cases.torch_pair import Pair
from qwen_build import build
from qwen_build.cli import main
from qwen_engine.errors import EngineError
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_run import LLM, QwenForCausalLM, SamplingParams
from qwen_run.runtime.engine import Batch, Engine

IDS = torch.tensor([[5, 17, 99, 3, 8, 41, 7], [64, 2, 77, 1, 0, 130, 4]])


@pytest.fixture(scope="module", params=[*FAMILIES, *WINDOWED])
def pair(request, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(request.param)
    return Pair(checkpoint.model, checkpoint.path, build_engine(checkpoint.path, quant="none", inputs_embeds=True))


@pytest.fixture(scope="module")
def one(tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint("qwen3-tied")
    return Pair(checkpoint.model, checkpoint.path, build_engine(checkpoint.path, quant="none", inputs_embeds=True))


def soft(model, columns, rows=2):
    """Embeddings that no token of ``model`` has."""
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(rows, columns, width, generator=torch.Generator().manual_seed(columns)) * 0.2


def test_logits_and_loss(pair):
    embeds, labels = soft(pair.theirs, 150), torch.arange(300).reshape(2, 150) % 131
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[1, -9:] = 0
    with torch.no_grad():
        ours, theirs = (
            model(inputs_embeds=embeds, attention_mask=mask, labels=torch.where(mask.bool(), labels, -100))
            for model in (pair.ours, pair.theirs)
        )
    assert float((ours.logits - theirs.logits)[mask.bool()].abs().max()) < 1e-4
    assert abs(float(ours.loss) - float(theirs.loss)) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}, {"output_scores": True}], ids=str
)
def test_a_soft_prompt_before_a_text(pair, options):
    """As prompt tuning does it: rows of its own, then those of the text's tokens."""
    embeds = [
        torch.cat([soft(model, 5), model.get_input_embeddings()(IDS).detach()], 1) for model in (pair.ours, pair.theirs)
    ]
    assert torch.equal(*embeds)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    ours, theirs = pair.both(None, mask, inputs_embeds=embeds[0], **options)
    assert pair.ours.last_loop == "transformers"
    assert torch.equal(ours, theirs)
    assert pair.ours.num_free_blocks == pair.free


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_tokens_row_is_what_the_engine_looks_up(quant, tiny_checkpoint, build_engine):
    model = QwenForCausalLM.from_pretrained(
        build_engine(tiny_checkpoint("qwen3-tied").path, quant=quant, inputs_embeds=True)
    )
    rows = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=rows).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="input_ids holds 3 to 131, expected 0 to 130"):
        model.get_input_embeddings()(torch.tensor([131, 3]))


def test_an_engine_that_takes_embeddings_answers_token_ids_as_another(one, tiny_checkpoint, build_engine):
    plain = build_engine(tiny_checkpoint("qwen3-tied").path, quant="none")
    answers = [
        LLM(engine, skip_tokenizer_init=True).generate(
            [{"prompt_token_ids": row} for row in IDS.tolist()], SamplingParams(temperature=0, max_tokens=9, logprobs=1)
        )
        for engine in (plain, one.path)
    ]
    assert [a.outputs[0].token_ids for a in answers[0]] == [a.outputs[0].token_ids for a in answers[1]]
    assert one.ours.generate(IDS, max_new_tokens=4).shape == (2, 11)
    assert one.ours.last_loop == "engine"


def test_a_run_takes_ids_and_embeddings_beside_each_other(one, tiny_checkpoint):
    """The embeddings say which tokens of a run they are; the ids of these count for nothing."""
    engine = Engine.load(one.path, threads=1)
    ids = IDS[0].numpy().astype(np.int64)
    expected = run_alone(engine, ids.tolist())
    rows = one.ours.get_input_embeddings()(IDS[0, [5, 2]]).numpy()
    hidden = ids.copy()
    hidden[[5, 2]] = 0
    found = engine.run(
        Batch(
            hidden,
            np.array([0, 7], np.int32),
            np.zeros(1, np.int32),
            np.array([[1]], np.int32),
            np.arange(7),
            rows,
            np.array([5, 2]),
        )
    )
    np.testing.assert_array_equal(found, expected)


def test_a_conversation_goes_on_with_token_ids(one):
    cache, embeds = one.ours.new_cache(), soft(one.theirs, 6)
    one.ours(inputs_embeds=embeds, past_key_values=cache)
    ours = one.ours(IDS, past_key_values=cache).logits
    whole = torch.cat([embeds, one.theirs.get_input_embeddings()(IDS)], 1)
    with torch.no_grad():
        theirs = one.theirs(inputs_embeds=whole).logits[:, 6:]
    assert float((ours - theirs).abs().max()) < 1e-4
    del cache
    gc.collect()
    assert one.ours.num_free_blocks == one.free


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(1, 2), r"inputs_embeds is \(1, 2\), expected a tensor of floats \(rows, columns, 80\)"),
        (torch.zeros(1, 2, 81), r"inputs_embeds is \(1, 2, 81\), expected"),
        (torch.zeros(1, 2, 80, dtype=torch.int64), r"inputs_embeds is \(1, 2, 80\), expected a tensor of floats"),
        (np.zeros((1, 2, 80)), "inputs_embeds is ndarray, expected a tensor of floats"),
        (torch.full((1, 2, 80), torch.nan), "inputs_embeds holds numbers that are not finite"),
        (torch.zeros(1, 2, 80, requires_grad=True), r"an engine has none; give inputs_embeds.detach\(\)"),
    ],
)
def test_other_embeddings_are_refused(one, embeds, message):
    with pytest.raises(ValueError, match=message):
        one.ours(inputs_embeds=embeds)


def test_both_at_once_are_refused(one):
    with pytest.raises(ValueError, match="both given or both missing"):
        one.ours(IDS, inputs_embeds=soft(one.theirs, 7))


def test_the_setting_says_how_the_engine_is_built(tiny_checkpoint, build_engine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = tiny_checkpoint("qwen3-tied").path
    options = {"export": True, "engine_quantization": "none"}
    model = QwenForCausalLM.from_pretrained(checkpoint, engine_use_inputs_embeds=True, **options)
    assert model(inputs_embeds=soft(model, 3)).logits.shape == (2, 3, 131)
    assert not QwenForCausalLM.from_pretrained(checkpoint, **options).engine.manifest.takes_embeds
    with pytest.raises(ValueError, match="use_inputs_embeds is True, expected False as the engine was built; build it"):
        QwenForCausalLM.from_pretrained(build_engine(checkpoint, quant="none"), engine_use_inputs_embeds=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"embeds_indices"', '"others"', "input others is not as expected, a batch has .*, inputs_embeds, embeds_ind"),
        ('"E",\n    80', '"E",\n    81', "input inputs_embeds is not as expected"),
    ],
)
def test_a_manifest_with_other_embeddings_is_refused(old, new, message, one):
    text = (one.path / MANIFEST_FILE).read_text()
    assert text.count(old) == 1
    with pytest.raises(EngineError, match=message):
        Manifest.from_json(text.replace(old, new))


def test_a_build_for_programs_and_commands_has_the_option(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("qwen2").path
    build(checkpoint, tmp_path / "one", inputs_embeds=True)
    done = CliRunner().invoke(main, [str(checkpoint), "--inputs-embeds", "--output", str(tmp_path / "two")])
    assert done.exit_code == 0, done.output
    one, two = (Manifest.read(tmp_path / name) for name in ("one", "two"))
    assert one.takes_embeds
    assert one.parts == two.parts
