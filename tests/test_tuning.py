"""Which configuration a kernel gets: the table's first, another architecture's, the fastest."""

import json

import pytest
import torch

from sra_kernels import tuning
from sra_kernels.tuning import Config, chosen

pytest.importorskip("triton")

SMALL, LARGE, WIDE = (Config({"BLOCK": n}, num_warps=w) for n, w in ((64, 2), (128, 4), (256, 8)))
CONFIGS = {"few": (SMALL, LARGE), "many": (LARGE, WIDE), "many@sm_90": (WIDE,)}
GPU = torch.device("cuda", 0)


@pytest.fixture
def on(monkeypatch, tmp_path):
    """A GPU of this architecture, on which a launch takes as long as its block is wide."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_found", {})
    ran = []

    def use(architecture):
        monkeypatch.setattr(tuning, "architecture", lambda device: architecture)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: architecture)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr("triton.testing.do_bench", lambda f, **_: f())

        def launch(config):
            ran.append(config)
            return -config.blocks["BLOCK"]

        return launch, ran

    return use


def test_the_first_of_the_bucket_without_a_trial(on):
    launch, ran = on("sm_80")
    assert chosen("kernel", CONFIGS, "many", GPU, launch) is LARGE
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is SMALL
    assert ran == []


def test_an_architecture_may_have_its_own(on):
    launch, _ = on("sm_90")
    assert chosen("kernel", CONFIGS, "many", GPU, launch) is WIDE
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is SMALL


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("sm_80", LARGE),
        ("sm_86", LARGE),
        ("sm_89", WIDE),
        ("sm_120", LARGE),
        ("sm_90", SMALL),
        ("sm_100", SMALL),
        ("gfx942", SMALL),
    ],
)
def test_its_own_goes_before_that_of_its_kind(on, architecture, wanted):
    launch, _ = on(architecture)
    configs = {"few": (SMALL,), "few@sm_80": (LARGE,), "few@sm_89": (WIDE,)}
    assert chosen("kernel", configs, "few", GPU, launch) is wanted


def test_what_a_launch_gets():
    assert WIDE.launch() == {"BLOCK": 256, "num_warps": 8, "num_stages": 2}


def test_tuning_takes_the_fastest_and_remembers_it(on, monkeypatch, tmp_path):
    launch, ran = on("sm_80")
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is LARGE
    assert ran == [SMALL, LARGE]
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is LARGE
    tuning._found.clear()  # as in the next process
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is LARGE
    assert len(ran) == 2
    written = json.loads((tmp_path / "sra_kernels" / "tuned.json").read_text())
    assert written["sm_80"]["kernel/few"]["blocks"] == {"BLOCK": 128}


def test_tuning_tries_again_where_what_it_remembers_is_no_candidate_any_more(
    on, monkeypatch, tmp_path
):
    launch, ran = on("sm_80")
    monkeypatch.setenv(tuning.VARIABLE, "1")
    path = tmp_path / "sra_kernels" / "tuned.json"
    path.parent.mkdir()
    for content in ('{"sm_80": {"kernel/few": {"blocks": {"BLOCK": 1}}}}', "half a fi"):
        path.write_text(content)
        ran.clear()
        tuning._found.clear()
        assert chosen("kernel", CONFIGS, "few", GPU, launch) is LARGE
        assert ran == [SMALL, LARGE]


def test_a_candidate_that_does_not_fit_is_passed_over(on, monkeypatch):
    from triton.runtime.errors import OutOfResources

    launch, _ = on("sm_80")
    monkeypatch.setenv(tuning.VARIABLE, "1")

    def limited(config):
        if config is LARGE:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return launch(config)

    assert chosen("kernel", CONFIGS, "few", GPU, limited) is SMALL


def test_nothing_is_tried_while_a_graph_is_captured(on, monkeypatch):
    launch, ran = on("sm_80")
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen("kernel", CONFIGS, "few", GPU, launch) is SMALL
    assert ran == []


def test_a_launch_that_cannot_be_repeated_is_not_tried(on, monkeypatch):
    on("sm_80")
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert chosen("kernel", CONFIGS, "few", GPU, None) is SMALL
