"""Each thing that `sra doctor` looks at, on pairs made to have it."""

from __future__ import annotations

import copy

import pytest
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from sra.doctor.diagnosis import Diagnosis, Finding, diagnose, needs
from sra.doctor.planner import Machine, Plan
from sra.objective import recipe
from tests import tiny

RATES = Machine(1e10, 1e10, 1e10, 1e9, 1e-5)


def config(rows: int = tiny.STUDENT_ROWS, **more):
    return AutoConfig.for_model(
        "llama", vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **more,
    )  # fmt: skip


def look(student=None, teacher=None, rows=tiny.ROWS, **options):
    given = {
        "student_config": config(),
        "teacher_config": config(tiny.TEACHER_ROWS),
        "resources": False,
        **options,
    }
    return diagnose(
        student or tiny.student_tokenizer(), teacher or tiny.teacher_tokenizer(), rows, **given
    )


def found(diagnosis: Diagnosis, topic: str) -> list[Finding]:
    return [f for f in diagnosis.findings if f.topic == topic]


def the(diagnosis: Diagnosis, topic: str) -> Finding:
    (one,) = found(diagnosis, topic)
    return one


def with_normaliser(tokenizer, normaliser):
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.normalizer = normaliser
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token
    )


def with_template(template, base=None):
    made = copy.deepcopy(base or tiny.teacher_tokenizer())
    made.chat_template = template
    return made


def test_a_good_pair_is_good():
    diagnosis = look()
    assert (diagnosis.exit_code, diagnosis.verdict) == (0, "good")
    assert the(diagnosis, "coverage") == Finding(
        "ok", "coverage", "100.0% of the trained bytes are in spans"
    )
    assert the(diagnosis, "vocabulary").level in ("ok", "note")
    assert the(diagnosis, "student round trip").text == "all 8 texts come back as they were"


def test_too_little_coverage_is_a_warning_with_the_worst_row():
    diagnosis = look(teacher=tiny.lossy_tokenizer(), numbers=range(100, 108))
    coverage = the(diagnosis, "coverage")
    assert coverage.level == "warning"
    assert "worst is row 101 with 0.0%: 'Count to five.'" in coverage.text
    assert "lower --min-coverage under" in coverage.remedy
    assert diagnosis.exit_code == 2
    assert "warning" in diagnosis.verdict


def test_a_minimum_that_is_met_is_no_warning():
    diagnosis = look(teacher=tiny.lossy_tokenizer(), min_coverage=0.0)
    assert the(diagnosis, "coverage").level == "ok"


def test_a_tokenizer_that_loses_text_fails_the_round_trip():
    lossy = the(look(teacher=tiny.lossy_tokenizer()), "teacher round trip")
    assert lossy.level == "warning"
    assert "texts come back changed, first row 0" in lossy.text
    reversed_roles = look(
        student=tiny.lossy_tokenizer(), teacher=tiny.teacher_tokenizer(),
        student_config=config(64), resources=False,
    )  # fmt: skip
    assert "can never write" in the(reversed_roles, "student round trip").remedy


def test_nfc_on_one_side_is_shown_with_its_code_points():
    rows = [{"prompt": "x", "completion": "Un cafe\u0301, bitte."}]
    nfc = with_normaliser(tiny.teacher_tokenizer(), normalizers.NFC())
    diagnosis = look(teacher=nfc, rows=rows)
    clash = the(diagnosis, "normaliser")
    assert clash.level == "warning"
    assert "the teacher composes accents (NFC); 1 of 1 texts differ, first row 0" in clash.text
    assert "U+0301" in clash.text
    assert "U+00E9" in clash.text
    assert 'unicodedata.normalize("NFC", text)' in clash.remedy
    assert the(diagnosis, "teacher round trip").text.endswith("its normaliser does that")


def test_nfc_that_no_text_shows_is_a_note():
    nfc = with_normaliser(tiny.teacher_tokenizer(), normalizers.NFC())
    clash = the(look(teacher=nfc), "normaliser")
    assert (clash.level, clash.text) == (
        "note", "the teacher composes accents (NFC); no text of this data shows it",
    )  # fmt: skip


def test_lower_casing_is_named():
    lower = with_normaliser(tiny.teacher_tokenizer(), normalizers.Lowercase())
    clash = the(look(teacher=lower), "normaliser")
    assert "the teacher lower-cases" in clash.text
    assert "unicodedata" not in clash.remedy


def test_the_space_that_sentencepiece_puts_in_front_is_no_clash():
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rows = [{"text": "one two"}, {"text": " three"}]
    spaced = with_normaliser(tiny.teacher_tokenizer(), marked)
    assert the(look(teacher=spaced, rows=rows), "normaliser").level == "ok"


def test_a_template_on_one_side_only():
    missing = the(look(), "chat template")
    assert missing.level == "note"
    assert "the student has none" in missing.text
    neither = look(teacher=with_template(None))
    assert "neither side has one" in the(neither, "chat template").text


CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": " The Nile. "}]


def test_a_template_that_refuses_a_role_of_the_data():
    refusing = with_template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system!') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "Be."}, *CHAT]}]
    template = the(look(teacher=refusing, rows=rows), "teacher template")
    assert template.level == "warning"
    assert "refuses 1 of 2 rows, first row 1: No system!" in template.text
    everything = look(teacher=refusing, rows=rows[1:])
    assert the(everything, "teacher template").level == "error"
    assert everything.exit_code == 1


def test_a_template_that_trims_what_is_learnt():
    trimming = with_template(tiny.CHAT.replace("m.content", "m.content | trim"))
    template = the(look(teacher=trimming, rows=[{"messages": CHAT}]), "teacher template")
    assert template.level == "warning"
    assert "rewrites what 1 of 1 rows say, first row 0; it trims contents" in template.text
    assert the(look(teacher=trimming), "teacher template").text == "trims contents"


def test_a_template_that_adds_a_system_message_or_drops_one():
    adding = with_template("<|begin|>system\nBe good.<|end|>" + tiny.CHAT)
    assert "system message of its own" in the(look(teacher=adding), "teacher template").text
    dropping = with_template(tiny.CHAT.replace("{{ m.role }}\n{{ m.content }}",
        "{% if m.role != 'system' %}{{ m.content }}{% endif %}"))  # fmt: skip
    assert "drops the system message" in the(look(teacher=dropping), "teacher template").text


def test_a_student_without_an_end_is_never_taught_to_stop():
    endless = PreTrainedTokenizerFast(
        tokenizer_object=tiny.student_tokenizer().backend_tokenizer, bos_token="<s>"
    )
    tokens = found(look(student=endless), "student tokens")
    assert any(f.level == "warning" and "never taught to stop" in f.text for f in tokens)
    assert "no padding token" in tokens[0].text


def test_a_turn_that_ends_with_another_token_than_the_text():
    other = with_template(tiny.CHAT.replace("<|end|>", "<|pad|>"))
    tokens = found(look(teacher=other), "teacher tokens")
    assert any("ends a turn with '<|pad|>', not with '<|end|>'" in f.text for f in tokens)


def test_model_and_tokenizer_that_name_different_ends():
    tokens = found(look(student_config=config(eos_token_id=7)), "student tokens")
    assert any("end is id 1, the model's 7" in f.text for f in tokens)


def test_head_rows_of_no_token_and_tokens_of_no_row():
    diagnosis = look(student_config=config(tie_word_embeddings=True))
    assert the(diagnosis, "student head").text == (
        "328 rows; 8 of them belong to no token and are never compared; tied to the embedding"
    )
    short = look(teacher_config=config(400))
    head = the(short, "teacher head")
    assert (head.level, short.exit_code) == ("error", 1)
    assert "400 rows for 420 entries" in head.text
    assert "resize_token_embeddings(420)" in head.remedy


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Gemma2Config(vocab_size=448), "logits capped at 30"),
        (CohereConfig(vocab_size=448, logit_scale=0.25), "logits times 0.25"),
        (GraniteConfig(vocab_size=448, logits_scaling=8.0), "logits times 0.125"),
    ],
    ids=["softcap", "scale", "divisor"],
)
def test_what_a_head_does_beside_its_product(made, text):
    assert text in the(look(teacher_config=made), "teacher head").text


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (BloomConfig(vocab_size=448), "no decoder layer that calls transformers'"),
        (MambaConfig(vocab_size=448), "no decoder layer that calls transformers'"),
    ],
    ids=["own attention", "no attention"],
)
def test_attention_that_cannot_be_read_is_an_error(made, why):
    diagnosis = look(teacher_config=made, objective=recipe("paper"))
    assert why in the(diagnosis, "teacher attention").text
    assert diagnosis.exit_code == 1
    for name in ("cross-entropy", "respell"):  # which read none
        without = look(teacher_config=made, objective=recipe(name))
        assert not found(without, "teacher attention")


def test_one_vocabulary_on_both_sides():
    same = look(teacher=tiny.student_tokenizer())
    assert "both have one and the same, of 320 entries" in the(same, "vocabulary").text


def test_little_shared_mass_hurts_only_an_objective_that_renormalises():
    """A teacher whose tokens are long, a student that knows no more than letters."""
    letters = PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level_bpe(258, ["<s>", "</s>"]), eos_token="</s>"
    )
    options = {"student": letters, "rows": tiny.ROWS[:1]}
    paper = the(look(**options, objective=recipe("paper")), "vocabulary")
    assert "what the student has no token for" in paper.text
    assert paper.level == "warning"
    assert "--outside weight" in paper.remedy
    assert the(look(**options), "vocabulary").level == "note"


def test_a_student_of_longer_tokens_has_few_targets():
    letters = PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level_bpe(258, ["<s>", "</s>"]), eos_token="</s>"
    )
    few = the(look(teacher=letters), "targets")
    assert few.level in ("note", "warning")
    assert "longer than the teacher's" in few.text
    assert "--likelihood 1" in few.remedy
    assert the(look(student=letters), "targets").level == "ok"  # every letter has one
    assert not found(look(objective=recipe("boundary")), "targets")
    assert not found(look(teacher=tiny.student_tokenizer()), "targets")


def test_truncation_counts_the_rows_that_it_cuts():
    assert "cuts none" in the(look(), "length").text
    cut = the(look(max_length=12), "length")
    assert cut.level in ("note", "warning")
    assert "Raise --max-length to" in cut.remedy
    lost = the(look(max_length=2), "length")
    assert lost.level == "warning"
    assert "leaves nothing to learn of" in lost.text


def test_no_rows():
    with pytest.raises(ValueError, match="There are no rows to look at"):
        look(rows=[])


# --- memory and time ---


def test_resources_are_predicted_and_held_against_what_there_is():
    fits = look(resources=True, machine=RATES, memory=1.0)
    assert fits.plan is not None
    assert 0 < fits.plan.peak < 2**30
    assert the(fits, "memory").level == "ok"
    assert "a step with a typical batch" in the(fits, "time").text
    tight = look(resources=True, machine=RATES, memory=1e-4)
    assert the(tight, "memory").level == "warning"
    assert "--batch-size 1" in the(tight, "memory").remedy
    assert tight.exit_code == 2


def test_the_remedy_names_the_part_that_is_large():
    plan = Plan({"teacher": 9 * 2**30, "student": 2**30}, "the loss", {"heads": 1.0}, 1, 1)
    memory, _ = needs(plan, 8.0, batch_size=1, cached=False, checkpointing=False)
    assert "a cached teacher (`sra cache`)" in memory.remedy
    assert "checkpointing" not in memory.remedy
    assert "needs 10.0 GiB" in memory.text


# --- the report ---


def test_the_report_puts_what_is_wrong_first_and_keeps_its_width():
    diagnosis = look(teacher=tiny.lossy_tokenizer())
    lines = diagnosis.report(width=90).splitlines()
    assert lines[0].startswith("student ← teacher, 8 rows: this runs, but ")
    levels = [line.split()[0] for line in lines[2:] if not line.startswith(" ")]
    assert levels == sorted(levels, key=("error", "warning", "note", "ok").index)
    assert max(map(len, lines)) <= 90
    assert "\033[" not in diagnosis.report()
    assert "\033[33mwarning\033[0m" in diagnosis.report(color=True)


def test_programs_get_the_same():
    diagnosis = look(resources=True, machine=RATES)
    told = diagnosis.to_dict()
    assert [f["topic"] for f in told["findings"]] == [f.topic for f in diagnosis.findings]
    assert told["plan"]["peak_bytes"] == diagnosis.plan.peak
    assert told["exit_code"] == 0
