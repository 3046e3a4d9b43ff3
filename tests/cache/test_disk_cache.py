"""A teacher's states on disk, as training finds them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from sra import (
    SpanAligner,
    SpanCollator,
    SpanDistiller,
    SRAConfig,
    SRATrainer,
    TeacherCache,
    recipe,
)
from sra.model import head_of
from sra.states import model_states
from sra.teacher_cache.cache import DiskCache, revision_of, sequence_states
from sra.teacher_cache.files import quantise
from sra.teacher_cache.writer import CacheWriter, teacher_sequences
from tests import tiny
from tests.cache.small_caches import relative, sequences, teacher_inputs, write

BOUNDARY, PAPER = recipe("boundary"), recipe("paper", outside="weight")
RESPELL = recipe("respell")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A finished cache of a bf16 teacher; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    write(folder)
    return folder


def gradients(teacher, batch, objective, dtype=torch.float32):
    torch.manual_seed(0)
    module = SpanDistiller(
        tiny.student_model(dtype), teacher, objective, vocabulary=tiny.vocabulary()
    )
    loss = module(**batch).loss
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in module.parameters()])
    return loss.item(), grads.double()


# --- what is read ---


@pytest.mark.parametrize("layers", [(-1,), (0, -1)], ids=["last", "two"])
def test_bf16_states_of_a_bf16_teacher_come_back_bit_for_bit(tmp_path, layers):
    teacher = tiny.teacher_model(torch.bfloat16)
    write(tmp_path / "cache", teacher, layers=layers)
    cache = DiskCache(tmp_path / "cache")
    with CacheWriter(tmp_path / "same", teacher, tiny.teacher_tokenizer(), layers=layers) as writer:
        batches = [*writer.batches(sequences(), 3)]
    assert sum(map(len, batches)) == len(tiny.ROWS) == len(cache)
    for batch in batches:
        for ids, want in zip(batch, sequence_states(teacher, batch, layers), strict=True):
            got = cache.states(ids[None], layers=layers)
            for i in range(len(layers)):
                assert got.hidden[i].dtype == torch.bfloat16
                assert torch.equal(got.hidden[i][0], want.hidden[i])
                assert torch.equal(got.mass[i][0], want.mass[i])


def test_its_head_is_the_teachers(written):
    ours, theirs = head_of(DiskCache(written)), head_of(tiny.teacher_model(torch.bfloat16))
    assert torch.equal(ours.weight, theirs.weight)
    assert ours[1:] == theirs[1:]
    assert not ours.weight.requires_grad


def test_a_head_with_bias_scale_and_softcap_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sra.states.check_head", lambda model: None)  # Qwen2 itself has neither
    teacher = tiny.teacher_model()
    teacher.lm_head = torch.nn.Linear(48, tiny.TEACHER_ROWS)
    teacher.config.logits_scaling = 8.0
    teacher.config.final_logit_softcapping = 30.0
    write(tmp_path / "cache", teacher)
    ours, theirs = head_of(DiskCache(tmp_path / "cache")), head_of(teacher)
    assert (ours.scale, ours.softcap) == (0.125, 30.0) == (theirs.scale, theirs.softcap)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize(
    "objective", [BOUNDARY, PAPER, RESPELL], ids=["boundary", "paper", "respell"]
)
def test_training_from_it_equals_training_from_the_model(tmp_path, objective):
    teacher = tiny.teacher_model(torch.bfloat16)
    write(tmp_path / "cache", teacher, batch_size=8)
    batch = tiny.collator()(sorted(tiny.ROWS, key=lambda row: -len(sequences([row])[0])))
    live_loss, live = gradients(teacher, batch, objective)
    for folder_order in (batch, batch):
        loss, grads = gradients(DiskCache(tmp_path / "cache"), folder_order, objective)
        assert loss == live_loss
        assert torch.equal(grads, live)


def test_the_trainer_takes_it_as_a_teacher(written, tmp_path):
    cache = DiskCache(written)
    trainer = SRATrainer(
        tiny.student_model(),
        cache,
        SRAConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=tiny.ROWS,
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=cache.tokenizer,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teachers"] == ["tiny"]


# (loss, gradients): how far from the live float32 teacher, of the same size as they are.
TOLERANCES = {"bfloat16": (1e-4, 3e-3), "int8": (5e-4, 1e-2)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "objective", [BOUNDARY, PAPER, RESPELL], ids=["boundary", "paper", "respell"]
)
def test_training_from_a_rounded_teacher_is_within_the_stated_tolerance(tmp_path, dtype, objective):
    teacher = tiny.teacher_model()
    write(tmp_path / "cache", teacher, dtype=dtype)
    cache = DiskCache(tmp_path / "cache")
    batch = tiny.collator()(tiny.ROWS)
    assert cache.states(**teacher_inputs(batch)).hidden[0].dtype == torch.float32
    live_loss, live = gradients(teacher, batch, objective)
    loss, grads = gradients(cache, batch, objective)

    assert 0 < abs(loss / live_loss - 1) < TOLERANCES[dtype][0]
    assert 0 < relative(grads, live) < TOLERANCES[dtype][1]


def test_int8_is_off_by_at_most_half_a_step_of_its_row():
    hidden = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    hidden[7] = 0
    stored, scale = quantise(hidden)
    assert stored.abs().amax(1).tolist() == [127 if i != 7 else 0 for i in range(50)]
    error = (stored.float() * scale[:, None] - hidden).abs().amax(1)
    assert (error <= scale * 0.5001).all()


def test_order_padding_side_packing_and_the_students_tokenizer_do_not_matter(written):
    cache = DiskCache(written)
    aligners = [
        SpanAligner(tokenizer, tiny.teacher_tokenizer())
        for tokenizer in (tiny.student_tokenizer(), tiny.teacher_tokenizer())
    ]
    known = {
        ids.numpy().tobytes(): cache.states(ids[None]) for ids in (x.long() for x in sequences())
    }
    for aligner in aligners:
        for padding in ("right", "left", "free"):
            batch = SpanCollator(aligner, padding=padding)([*tiny.ROWS[::-1], tiny.ROWS[2]])
            inputs = teacher_inputs(batch)
            got = cache.states(**inputs)
            ids, hidden, mass = (
                x.flatten(0, 1) for x in (inputs["input_ids"], got.hidden[0], got.mass[0])
            )
            seen = 0
            for rows in ranges(inputs):
                want = known[ids[rows].numpy().tobytes()]
                assert torch.equal(hidden[rows], want.hidden[0][0])
                assert torch.equal(mass[rows], want.mass[0][0])
                seen += len(rows)
            assert seen == int((mass > 0).sum())
            assert hidden[mass == 0].abs().sum() == 0


def ranges(inputs):
    """The rows of each sequence, told by another way than the cache's."""
    if "attention_mask" in inputs:
        width = inputs["input_ids"].shape[1]
        real = inputs["attention_mask"].tolist()
        return [
            torch.tensor([i * width + j for j in range(width) if row[j]])
            for i, row in enumerate(real)
        ]
    position = inputs["position_ids"][0].tolist()
    starts = [i for i, x in enumerate(position) if x == 0] + [len(position)]
    return [torch.arange(a, b) for a, b in itertools.pairwise(starts)]


def test_in_memory_too_packing_finds_what_padding_stored():
    teacher = tiny.teacher_model()
    cache = TeacherCache(teacher)
    cache.states(**teacher_inputs(tiny.collator()(tiny.ROWS)))
    size = cache.nbytes
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    packed = teacher_inputs(SpanCollator(aligner, padding="free")(tiny.ROWS))
    got = cache.states(**packed, layers=(1,))
    assert cache.nbytes == size
    with torch.no_grad():
        want = model_states(teacher, **packed)
    torch.testing.assert_close(got.hidden[0], want.hidden[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mass[0], want.mass[0], rtol=1e-4, atol=1e-6)
    cache.states(**packed, layers=(0,))
    assert cache.nbytes == 2 * size


def test_a_batch_without_rows_for_this_teacher(written):
    none = torch.zeros(0, 5, dtype=torch.long)
    for cache in (DiskCache(written), TeacherCache(tiny.teacher_model(torch.bfloat16))):
        got = cache.states(none, none)
        assert got.hidden[0].shape == (0, 5, 48)
        assert got.hidden[0].dtype == torch.bfloat16
        assert got.mass[0].shape == (0, 5)


def test_processes_read_it_at_once(written):
    cache = DiskCache(written)
    ids = [x[None].long() for x in sequences()]
    want = [total(cache, x) for x in ids]  # opens the shards, which the forked processes inherit
    with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
        assert pool.starmap(total, [(cache, x) for x in ids]) == want
    sent = pickle.loads(pickle.dumps(cache))  # as a spawned one gets it
    assert [total(sent, x) for x in ids] == want


def total(cache, ids):
    return float(cache.states(ids).hidden[0].float().sum())


def test_the_ids_are_those_of_the_collator():
    aligner = SpanAligner(tiny.teacher_tokenizer(), tiny.teacher_tokenizer())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A river?"},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "And another?"},
        {"role": "assistant", "content": "The Rhine."},
        {"role": "user", "content": "Thanks."},
    ]
    rows = [*tiny.ROWS, {"messages": messages}, {"text": "Up on most maps."}]
    for options in (
        {}, {"max_length": 40}, {"chat_template": False}, {"train_turns": "all"},
    ):  # fmt: skip
        batch = SpanCollator(aligner, **options)(rows)["teachers"][0]
        want = [
            ids[keep.bool()].tolist()
            for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert [ids.tolist() for ids in sequences(rows, **options)] == want


# --- what is asked for and is not there ---


def test_a_text_that_it_lacks_is_an_error_that_shows_it(written):
    cache = DiskCache(written)
    batch = tiny.collator()([tiny.ROWS[0], {"prompt": "new", "completion": "text"}])
    with pytest.raises(ValueError, match=r"lacks 1 of 2 texts\. .*<\|begin\|>user") as e:
        cache.states(**teacher_inputs(batch))
    assert "Add them with sra cache (same data, max_length and chat template" in str(e.value)
    ids = sequences([tiny.ROWS[0], {"prompt": "new", "completion": "text"}])
    assert [x in cache for x in ids] == [True, False]
    cache.check(sequences())
    with pytest.raises(ValueError, match=r"lacks 1 of 2 texts\. The first has \d+ tokens"):
        cache.check(ids)


def test_a_live_teacher_answers_for_what_it_lacks(written):
    teacher = tiny.teacher_model(torch.bfloat16)
    cache = DiskCache(written, teacher)
    inputs = teacher_inputs(tiny.collator()([{"prompt": "new", "completion": "text"}, *tiny.ROWS]))
    with torch.no_grad():
        want = model_states(teacher, **inputs)
    got = cache.states(**inputs)
    torch.testing.assert_close(got.mass[0], want.mass[0], rtol=0.05, atol=1e-3)
    real = inputs["attention_mask"].bool()
    assert relative(got.hidden[0][real].double(), want.hidden[0][real].double()) < 0.02
    assert len(cache) == len(tiny.ROWS)


def test_another_model_as_live_teacher_is_refused(written):
    with pytest.raises(ValueError, match="holds states of another teacher: of tiny, revision"):
        DiskCache(written, tiny.teacher_model(torch.bfloat16, seed=5))
    with pytest.raises(ValueError, match=r"tiny in bfloat16.*is in float32.*dtype=bfloat16"):
        DiskCache(written, tiny.teacher_model())


def test_a_layer_that_it_lacks(written):
    ids = sequences()[0][None]
    with pytest.raises(ValueError, match=r"holds layers 1 of tiny, and layer 0 is asked for"):
        DiskCache(written).states(ids, layers=(0,))


def test_its_tokenizer_is_the_one_that_wrote_the_texts(written, tmp_path):
    cache = DiskCache(written)
    assert [ids.tolist() for ids in teacher_sequences(tiny.ROWS, cache.tokenizer)] == [
        ids.tolist() for ids in sequences()
    ]
    folder = shutil.copytree(written, tmp_path / "cache")
    with (folder / "tokenizer" / "chat_template.jinja").open("a") as template:
        template.write("!")
    with pytest.raises(ValueError, match="loads as another tokenizer than the one that wrote"):
        DiskCache(folder).tokenizer  # noqa: B018


def test_no_cache_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no teacher cache.*sra cache TEACHER"):
        DiskCache(tmp_path)


def test_a_revision_is_of_weights_and_configuration_alone(tmp_path):
    model = tiny.teacher_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert revision_of(loaded) == revision_of(model)
    loaded.config.rms_norm_eps *= 2
    assert revision_of(loaded) != revision_of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert revision_of(tiny.teacher_model()) != revision_of(model)
