"""A run watches which of the facts that the base model knows are kept."""

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, deepspeed_file, example_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import launch
from test_train import Runner, interrupt_after, same_adapter

import train
from data import InputError, encode_prompt
from inference.generation import DecodingArguments, generate_answers
from inference.knowledge import Knowledge, _divergence, _log_probs
from inference.knowledge_plot import retention_curve
from inference.trained import InferenceArguments, load_trained
from scripts import evaluate
from training import knowledge
from training.knowledge import REFERENCE_NAME, KnowledgeWatch
from transformers_patch import logits

QUESTIONS = [f"What is {name}?" for name in ("gold", "iron", "salt", "rain", "hail")]
BEST = {"metric_for_best_model": "knowledge_kept", "load_best_model_at_end": "true", "save_steps": 2}
FIGURES = ("facts", "revealed", "known", "kept", "share", "kl_prompts", "kl_text")
# At these rates, a run loses some facts, not all.
RATES = {"loramoe": 0.002, "full": 0.0001}
GENTLE_SGD = {"loramoe": 0.3, "full": 0.01}


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    """A run with a probe of facts that the base model knows, since they are its own answers, and one that it does not.

    A training row reveals one of them.
    """
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    runner = Runner(tmp_path, model_dir)
    write_probe(tmp_path / "probe.json", InferenceArguments(str(model_dir)))
    revealing = {"instruction": QUESTIONS[0], "output": "a metal", "task_type": 0}
    (tmp_path / "train.json").write_text(json.dumps([*example_rows(11), revealing]))
    runner.flags |= {"knowledge_probe": tmp_path / "probe.json", "eval_strategy": "steps", "eval_steps": 2}
    return runner


def write_probe(file: Path, base: InferenceArguments) -> None:
    """A base model's own answers to the questions, and a question that it has no answer to."""
    trained = load_trained(base)
    prompts = [encode_prompt(trained.tokenizer, "chat", question, "") for question in QUESTIONS]
    settings = DecodingArguments(max_new_tokens=24).settings(1, trained.end_tokens("chat"))
    answers = [
        trained.tokenizer.decode(ids, skip_special_tokens=True)
        for ids in generate_answers(trained.model, prompts, settings)
    ]
    rows = [{"prompt": question, "completion": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    rows.append({"prompt": "Who knows?", "completion": "nobody"})
    file.write_text(json.dumps(rows))


def evaluated(run, *flags) -> dict:
    """What `scripts.evaluate --knowledge` finds in the run's folder."""
    output, cache = run.folder / "evaluation.json", run.flags["data_cache_dir"]
    command = ("--adapter", run.output, "--knowledge", "--output", output, "--data_cache_dir", cache)
    evaluate.main([*map(str, command), *flags])
    return json.loads(output.read_text())["knowledge"]


def agree(found: dict, expected: dict, **tolerance) -> bool:
    """True if the figures and the lost facts, of which some are known and some kept, are the same."""
    assert 0 < expected["kept"] < expected["known"] == 4
    assert len(expected["lost"]) == expected["known"] - expected["kept"]
    figures = [{name: each[name] for name in FIGURES} for each in (found, expected)]
    questions = [[fact["question"] for fact in each["lost"]] for each in (found, expected)]
    return figures[0] == pytest.approx(figures[1], **tolerance) and questions[0] == questions[1]


def shares(log: list[dict]) -> list[float]:
    return [entry["eval_knowledge_kept"] for entry in log if "eval_knowledge_kept" in entry]


def test_a_run_says_what_it_kept_as_the_evaluation_of_its_folder_does(run, capsys):
    found = run(learning_rate=RATES["loramoe"])["knowledge"]
    assert (found["facts"], found["revealed"], found["known"]) == (5, 1, 4)
    assert found["kl_prompts"] > 0 < found["kl_text"]
    log = run.log()
    assert shares(log)[0] == 1 > shares(log)[1] > found["share"] == shares(log)[-1]
    assert next(entry["eval_knowledge_kl_text"] for entry in log if "eval_knowledge_kl_text" in entry) == 0
    out = capsys.readouterr().out
    assert "5 of 6 facts; not asked: 1 that training rows reveal" in out
    last = f"world knowledge       4 of 5 facts known before, {found['kept']} of them ({25 * found['kept']} %) after"
    (example, *_) = found["lost"]
    assert last in out
    assert f"forgotten, for example:\n  {example['question']}  " in out
    card = (run.output / "README.md").read_text()
    assert f"| facts known | 4 |\n| facts kept | {found['kept']} |" in card
    assert "retention.png" in card
    curve = retention_curve(log)
    assert [step for step, *_ in curve] == [0, 2, 4, 6]
    assert curve[0][2:] == (1, 0)
    assert curve[-1][2] == found["share"]
    assert not (run.output / REFERENCE_NAME).exists()

    train.main(run.arguments(learning_rate=RATES["loramoe"]))
    assert last in capsys.readouterr().out
    assert agree(evaluated(run), found, rel=1e-5)


def test_a_complete_model_is_compared_with_the_one_that_it_was(run):
    found = run(tuning="full", learning_rate=RATES["full"])["knowledge"]
    assert found["kl_text"] > 0
    assert agree(evaluated(run), found, rel=1e-5)
    with pytest.raises(InputError, match=r"name it with --base_model \(.*nowhere"):
        evaluated(run, "--base_model", str(run.folder / "nowhere"))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_model_is_asked_as_it_is(run, quantisable_dir, bits):
    write_probe(run.folder / "probe.json", InferenceArguments(str(quantisable_dir), load_in_kbits=bits))
    found = run(model_name_or_path=quantisable_dir, load_in_kbits=bits, learning_rate=0.0002)["knowledge"]
    assert shares(run.log())[0] == 1
    assert found["kl_prompts"] > 0 < found["kl_text"]
    assert agree(evaluated(run, "--load_in_kbits", str(bits)), found, rel=1e-3)


@pytest.mark.parametrize("tuning", ["loramoe", "full"])
def test_training_goes_on_as_if_nothing_had_been_asked(run, tmp_path, tuning):
    run(tuning=tuning, lora_dropout=0.1)
    run(tuning=tuning, lora_dropout=0.1, knowledge_probe="none", output_dir=tmp_path / "unasked")
    logs = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (run.output, tmp_path / "unasked")
    ]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    if tuning == "loramoe":
        assert same_adapter(run.output, tmp_path / "unasked")
    assert "knowledge" not in json.loads((tmp_path / "unasked" / "all_results.json").read_text())


@pytest.mark.parametrize("tuning", ["loramoe", "full"])
def test_a_resumed_run_compares_with_what_the_base_model_knew(run, tmp_path, tuning):
    settings = {"tuning": tuning, "learning_rate": RATES[tuning]}
    whole = run(**settings, output_dir=tmp_path / "whole")["knowledge"]
    interrupt_after(3, run, **settings)
    assert (run.output / REFERENCE_NAME).is_file()
    resumed = run(**settings)["knowledge"]
    assert agree(resumed, whole, rel=0, abs=0)
    assert resumed["lost"] == whole["lost"]


@pytest.mark.parametrize(("tuning", "file"), [("loramoe", None), ("loramoe", "zero3.json"), ("full", "zero3.json")])
def test_several_processes_find_what_one_finds(run, tmp_path, tuning, file):
    settings = {"tuning": tuning, "lora_dropout": 0, "learning_rate": GENTLE_SGD[tuning], "optim": "sgd"}
    alone = run(**settings, output_dir=tmp_path / "alone")["knowledge"]
    sharding = {"deepspeed": deepspeed_file(tmp_path, file)} if file else {}
    flags = run.arguments(**settings, **sharding, per_device_train_batch_size=2)
    launch(2, [str(ROOT / "train.py"), *flags])
    together = json.loads((run.output / "all_results.json").read_text())["knowledge"]
    assert agree(together, alone, rel=1e-3, abs=1e-6)


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "said"), [(Path.unlink, "does not hold the base model's answers"), (damage, "is damaged")]
)
def test_a_resumed_run_of_all_weights_without_the_answers_says_so(run, capsys, harm, said):
    interrupt_after(3, run, tuning="full")
    harm(run.output / REFERENCE_NAME)
    assert run(tuning="full")["knowledge"] == {}
    assert re.search(f"warning: .*{said}.*: knowledge is not measured", capsys.readouterr().out)


def test_a_resumed_run_with_damaged_answers_asks_again(run, tmp_path, capsys):
    settings = {"learning_rate": RATES["loramoe"]}
    whole = run(**settings, output_dir=tmp_path / "whole")["knowledge"]
    interrupt_after(3, run, **settings)
    damage(run.output / REFERENCE_NAME)
    assert agree(run(**settings)["knowledge"], whole, rel=0, abs=0)
    assert "knowledge.safetensors is damaged" in capsys.readouterr().out


def test_a_resumed_run_of_all_weights_whose_best_model_needs_the_answers_stops(run):
    interrupt_after(3, run, tuning="full", **BEST)
    (run.output / REFERENCE_NAME).unlink()
    with pytest.raises(InputError, match="so --metric_for_best_model knowledge_kept cannot go on"):
        run(tuning="full", **BEST)


@pytest.mark.parametrize("best", [{}, BEST])
def test_a_resumed_run_with_another_probe_says_so(run, capsys, best):
    interrupt_after(3, run, **best)
    probe = run.folder / "probe.json"
    probe.write_text(json.dumps(json.loads(probe.read_text())[1:]))
    if best:
        with pytest.raises(InputError, match="so --metric_for_best_model knowledge_kept cannot go on"):
            run(**best)
    else:
        assert run()["knowledge"]["facts"] == 5
        said = r"does not hold .* the base model is asked again, and later measurements are of other facts\n"
        assert re.search(f"warning: .*{said}", capsys.readouterr().out)


def test_a_run_that_goes_on_without_a_probe_draws_no_curve(run):
    best = {"load_best_model_at_end": "true", "save_steps": 2}
    interrupt_after(3, run, **best)
    assert "knowledge" not in run(**best, knowledge_probe="none")
    assert not (run.output / "retention.png").exists()
    assert not (run.output / REFERENCE_NAME).exists()


def test_a_base_model_that_knows_no_fact_is_pointed_out(run, capsys):
    unknown = [{"prompt": question, "completion": "nobody"} for question in QUESTIONS]
    (run.folder / "probe.json").write_text(json.dumps(unknown))
    with pytest.raises(InputError, match=r"knows none of the 4 facts .* knowledge_kept cannot choose"):
        run(**BEST, output_dir=run.folder / "best")
    assert run()["knowledge"]["known"] == 0
    assert "warning: the base model knows none of the 4 facts" in capsys.readouterr().out


@pytest.mark.parametrize(("best", "steps"), [({}, [0, 6]), (BEST, [0, 2, 4, 6])])
def test_evaluations_that_ask_too_long_ask_nothing(run, monkeypatch, capsys, best, steps):
    monkeypatch.setattr(knowledge, "LEAST_SECONDS", 0)
    run(**best)
    assert [step for step, *_ in retention_curve(run.log())] == steps
    said = capsys.readouterr().out
    assert said.count("knowledge is not measured at some evaluations") == (not best)
    assert "% of the run's time" in said


WARNING = "warning: of 4 facts that the base model knows, "


@pytest.mark.parametrize(
    ("tuning", "last"), [("loramoe", "perhaps half of --lora_rank"), ("full", "a third of the --learning_rate")]
)
def test_a_lost_third_is_said_once(run, monkeypatch, capsys, tuning, last):
    monkeypatch.setattr(knowledge, "WARN_FROM", 4)
    run(tuning=tuning, learning_rate=0.1)
    out = capsys.readouterr().out
    assert out.count(WARNING) == 1
    assert re.search(f"{WARNING}. are left at step 2. .*task type 1, questions about other facts.*; {last}", out)


@pytest.mark.parametrize(("known", "kept", "is_said"), [(30, 20, True), (30, 21, False), (10, 0, True), (9, 0, False)])
def test_a_lost_third_of_ten_is_said(tmp_path, known, kept, is_said):
    watch = KnowledgeWatch(None, tmp_path, "loramoe", starts_as_base=True)
    watch.last = Knowledge(200, 0, known, kept, 0.0, 0.0)
    assert bool(watch.warning(1, [])) == is_said
    assert not watch.warning(2, [{"step": 1, "eval_knowledge_kept": kept / known}] if is_said else [])


def test_of_few_facts_a_lost_third_is_not_said(run, capsys):
    assert run(learning_rate=0.1)["knowledge"]["kept"] == 0
    assert WARNING not in capsys.readouterr().out


def test_what_an_adapter_had_lost_before_does_not_hide_what_it_loses(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(knowledge, "WARN_FROM", 4)
    run(learning_rate=0.1)
    capsys.readouterr()
    run(learning_rate=0.1, peft_path=run.output, output_dir=tmp_path / "on")
    out = capsys.readouterr().out
    assert out.count(WARNING) == out.count(f"{WARNING}0 are left at step 2") == 1


def test_a_run_without_evaluation_rows_measures_logs_and_warns_at_its_end(run, monkeypatch, capsys):
    monkeypatch.setattr(knowledge, "WARN_FROM", 4)
    found = run(learning_rate=0.1, validation_file=None, eval_strategy=None, eval_steps=None)["knowledge"]
    assert found["known"] == 4
    assert capsys.readouterr().out.count(f"{WARNING}0 are left at step 6") == 1
    assert shares(run.log()) == [found["share"]]
    events = EventAccumulator(str(run.output / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/knowledge_kept")] == [(6, found["share"])]


def test_the_best_model_can_be_the_one_that_knows_most(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "plot_retention", lambda path, *what: drawn.append(what))
    run(learning_rate=RATES["loramoe"], **BEST)
    log = run.log()
    state = json.loads((run.output / "trainer_state.json").read_text())
    asked = shares(log)[1:-1]
    assert state["best_metric"] == max(asked) == shares(log)[-1] > min(asked)
    ((curve, saved),) = drawn
    assert saved == state["best_global_step"] == 2
    assert [(step, kept) for step, _, kept, _ in curve] == list(zip([0, 2, 4, 6], [1, *asked], strict=True))
    *_, final = (entry["eval_lm_loss"] for entry in log if "eval_lm_loss" in entry)
    assert {step: loss for step, loss, *_ in curve}[2] == pytest.approx(final, rel=1e-6)


@pytest.mark.parametrize("least_kept", [0, 0.5, 1])
def test_the_best_model_can_be_the_best_of_those_that_know_enough(run, capsys, least_kept):
    best = {"metric_for_best_model": "loss_if_kept", "load_best_model_at_end": "true", "save_steps": 2}
    run(learning_rate=RATES["loramoe"], least_kept=least_kept, **best)
    state = json.loads((run.output / "trainer_state.json").read_text())
    chosen = int(state["best_model_checkpoint"].rpartition("-")[2])
    curve = retention_curve(run.log()[:-1])[1:]
    most = max(kept for *_, kept, _ in curve)
    enough = [(loss, step) for step, loss, kept, _ in curve if kept >= least_kept]
    assert chosen == (min(enough)[1] if enough else next(step for step, _, kept, _ in curve if kept == most))
    out = capsys.readouterr().out
    said = f"no evaluated model keeps --least_kept 1.0 of the known facts; the most is {most}, at step {chosen}. Lower"
    assert out.count("no evaluated model") == out.count(said) == (least_kept == 1)
    # Neither loss nor knowledge alone chooses this one.
    assert least_kept != 0.5 or chosen not in (curve[-1][0], curve[0][0])


def test_shares_are_rounded_down():
    assert "399 of them (99 %) after" in Knowledge(400, 0, 400, 399, 0.0, 0.0).lines()[0]
    assert "400 of them (100 %) after" in Knowledge(400, 0, 400, 400, 0.0, 0.0).lines()[0]


def test_divergence_is_that_of_a_loop_whatever_the_chunks_and_excluded_tokens(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base_NV, now_NV = torch.randn(2, 7, 12, generator=generator)
    base_NV[:, 3] = now_NV[:, 3] = -torch.inf
    base_NV[2, 5] = -torch.inf
    expected = 0.0
    for base_V, now_V in zip(base_NV.double().softmax(-1), now_NV.double().softmax(-1), strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(base_V.tolist(), now_V.tolist(), strict=True) if p)
    for chunk in (12, 30, 1000):
        monkeypatch.setattr(logits, "CHUNK", chunk)
        row = {"base": _log_probs({}, base_NV)}
        torch.testing.assert_close(row["base"], base_NV.log_softmax(-1))
        assert _divergence(row, now_NV) == pytest.approx(expected, rel=1e-5)
        assert _divergence(row, base_NV) == 0


@pytest.mark.parametrize("best", [{}, BEST])
def test_a_probe_that_chooses_the_best_model_belongs_to_the_run(run, no_weights, best):
    train.main(run.arguments(prepare_only="true", **best))
    with pytest.raises(InputError, match="probe_facts: 200 there, 3 now") if best else nullcontext():
        train.main(run.arguments(prepare_only="true", **best, probe_facts=3))


def test_bad_probes_are_refused(run, tmp_path, monkeypatch, no_weights):
    with pytest.raises(InputError, match=r"--knowledge_probe .*nowhere.json: no such file or folder"):
        train.main(run.arguments(knowledge_probe=tmp_path / "nowhere.json"))
    with pytest.raises(InputError, match="--probe_facts is 0, but has to be at least 1"):
        train.main(run.arguments(probe_facts=0))
    with pytest.raises(InputError, match="--metric_for_best_model knowledge_kept needs a --knowledge_probe"):
        train.main(run.arguments(metric_for_best_model="knowledge_kept", knowledge_probe="none"))
    with pytest.raises(InputError, match="--metric_for_best_model knowledge_kept needs an --eval_strategy"):
        train.main(run.arguments(metric_for_best_model="knowledge_kept", eval_strategy="no", eval_steps=None))
    with pytest.raises(InputError, match=r"--least_kept is 1\.5, but has to be from 0 to 1"):
        train.main(run.arguments(least_kept=1.5))
    (tmp_path / "probe.json").write_text(json.dumps([{"prompt": "?", "completion": "a"}, {"prompt": "b"}]))
    monkeypatch.setattr(train, "load_part", lambda *arguments: pytest.fail("rows were read"))
    with pytest.raises(InputError, match=r"probe.json: row 2: "):
        train.main(run.arguments())
    with pytest.raises(InputError, match=r"--knowledge_probe needs --knowledge\n.*--probe_facts needs --knowledge"):
        evaluate.main(["--adapter", str(tmp_path), "--knowledge_probe", "auto", "--probe_facts", "3"])


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a model is built."""
    monkeypatch.setattr(train, "build_model", lambda *arguments: pytest.fail("weights were read"))
