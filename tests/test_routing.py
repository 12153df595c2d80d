"""Routing, seen: what is watched while training, what the files hold, and the picture."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import filled_model
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import Runner
from torch._subclasses import FakeTensorMode
from transformers import TrainingArguments

from data import InputError, encode_prompt
from inference import trained
from inference.routing import Routing, coefficient_of_variation, relative_entropy, routing_lines, routing_summary
from inference.routing_plot import _label_experts as label_experts
from inference.routing_plot import plot_routing as draw
from inference.rows import batches, load_rows
from peft import LoraConfig, PeftModel, get_peft_model
from scripts import plot_routing
from training.routing_watch import COLLAPSE_STEPS, RoutingWatch
from transformers_patch import AutoModelForCausalLM, RoutingRecorder

SCALARS = {"routing_entropy", "routing_cv", "group_share_type_0", "group_share_type_1"}


@pytest.fixture
def arguments(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


def test_evenness_at_its_ends():
    even, one = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert relative_entropy(even).item() == pytest.approx(1)
    assert relative_entropy(one).item() == 0
    assert coefficient_of_variation(even).item() == 0
    assert coefficient_of_variation(one).item() == pytest.approx(2)


def test_the_values_of_a_log_line_are_those_of_its_rows(arguments):
    """Three Linears, four experts, micro-batches of two sizes; unlabelled rows and a padding example among them."""
    shares_LBE = torch.softmax(torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)) * 2, dim=-1)
    types, row_weights = torch.tensor([[0, 1, -1, 1, 0, -1, 1], [1, 1, 1, 1, 1, 0, 1]])
    watch = RoutingWatch(2, [2, 2])
    for part in (slice(0, 2), slice(2, 7)):
        watch.watch(shares_LBE[:, part], types[part], row_weights[part])
    real = [0, 1, 2, 3, 4, 6]
    load_LE = shares_LBE[:, real].mean(dim=1)
    entropy = -(shares_LBE[:, real] * shares_LBE[:, real].log()).sum(dim=-1).mean() / math.log(4)
    expected = {
        "routing_entropy": entropy.item(),
        "routing_cv": (load_LE.std(dim=1) / load_LE.mean(dim=1)).mean().item(),
        "group_share_type_0": shares_LBE[:, [0, 4], :2].sum(dim=-1).mean().item(),
        "group_share_type_1": shares_LBE[:, [1, 3, 6], 2:].sum(dim=-1).mean().item(),
    }
    assert watch.scalars(arguments) == pytest.approx(expected)
    watch.watch(shares_LBE[:, :1], types[:1], row_weights[:1])
    assert watch.scalars(arguments).keys() == SCALARS - {"group_share_type_1"}


def test_without_groups_or_routers_there_are_fewer_values(arguments):
    watch = RoutingWatch(2, [5])
    assert watch.scalars(arguments) == {}
    assert watch.collapse(arguments, 1) is None
    watch.watch(torch.full((1, 2, 5), 0.2), torch.tensor([0, 1]), torch.ones(2))
    assert watch.scalars(arguments).keys() == {"routing_entropy", "routing_cv"}
    assert watch.collapse(arguments, 1) is None


def test_groups_of_different_sizes_are_summed_each(arguments):
    watch = RoutingWatch(3, [1, 2, 1])
    watch.watch(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).expand(1, 3, 4), torch.tensor([0, 1, 2]), torch.ones(3))
    shares = {f"group_share_type_{kind}": share for kind, share in enumerate((0.1, 0.5, 0.4))}
    assert {k: v for k, v in watch.scalars(arguments).items() if k in shares} == pytest.approx(shares)
    routing = Routing(["up"], np.array([[[0.1, 0.2, 0.3, 0.4]]]), np.array([1]), np.array([""]))
    config = LoraConfig(lora_nums=4, num_task_types=3, expert_groups=[1, 2, 1], task_type_names=["a", "b", "c"])
    head, line = routing_lines(routing, config)
    assert head.split() == ["expert", "0", "experts", "1-2", "expert", "3"]
    assert line.split() == ["task", "type", "b", "10.0%", "50.0%", "40.0%"]


@pytest.mark.parametrize(
    ("groups", "expected", "collapsed"),
    [(None, ["experts 0-2", "null expert"], False), ([1, 3], ["expert 0", "experts 1-2, null"], True)],
)
def test_the_null_expert_is_named_and_counts_but_alone_cannot_collapse(arguments, groups, expected, collapsed):
    config = LoraConfig(lora_nums=3, lora_null_expert=True, expert_groups=groups)
    shares = [0.1, 0.2, 0.3, 0.4]
    routing = Routing(["up"], np.array([[shares]]), np.array([1]), np.array([""]))
    head, line = routing_lines(routing, config)
    assert re.split("  +", head.strip()) == expected
    own = sum(shares[-config.group_sizes[1] :])
    assert line.split()[-2:] == [f"{1 - own:.1%}", f"{own:.1%}"]
    found = routing_summary(routing, config)
    assert (found["num_experts"], found["null_expert"], found["expert_groups"]) == (4, 3, config.group_sizes)
    watch = RoutingWatch(config.num_task_types, config.group_sizes, config.null_expert)
    for _ in range(COLLAPSE_STEPS):
        watch.watch(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), torch.tensor([1]), torch.ones(1))
        watch.on_step_end(None, None, None)
    values = watch.scalars(arguments)
    assert (values["group_share_type_1"], values["routing_cv"]) == (0, 2)
    message = watch.collapse(arguments, COLLAPSE_STEPS)
    assert (message is not None) == collapsed
    assert not collapsed or "collapsed: experts 1-2, the group of task type 1, have had" in message
    for _ in range(COLLAPSE_STEPS):
        watch.watch(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]), torch.tensor([0]), torch.ones(1))
        watch.on_step_end(None, None, None)
    message = watch.collapse(arguments, COLLAPSE_STEPS)  # once in a run
    assert collapsed or f"collapsed: {expected[0]}, the group of task type 0, have had" in message


@pytest.mark.parametrize(("trained", "collapsed"), [(0.0, True), (0.03, False)])
def test_a_null_expert_does_not_keep_the_trained_ones_of_its_group_alive(arguments, trained, collapsed):
    watch = RoutingWatch(2, [3, 4], null_expert=6)
    shares = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, trained, 0.7 - trained])
    for _ in range(COLLAPSE_STEPS):
        watch.watch(shares[None, None], torch.tensor([1]), torch.ones(1))
        watch.on_step_end(None, None, None)
    assert watch.scalars(arguments)["group_share_type_1"] == pytest.approx(0.7)
    message = watch.collapse(arguments, COLLAPSE_STEPS)
    assert (message is not None) == collapsed
    assert not collapsed or "collapsed: experts 3-5, the group of task type 1, have had" in message


@pytest.mark.parametrize(("experts", "labels"), [(6, [*"012345", "null"]), (20, [*map(str, range(0, 20, 2)), "null"])])
def test_the_null_expert_is_named_in_the_picture(experts, labels):
    axes = Figure().subplots()
    label_experts(axes, {"num_experts": experts + 1, "null_expert": experts})
    assert [label.get_text() for label in axes.get_xticklabels()] == labels


def test_a_collapse_is_warned_of_once_after_as_many_steps_in_a_row(arguments):
    watch, warnings = RoutingWatch(2, [2, 2]), []

    def steps(count: int, share: float):
        for _ in range(count):
            watch.watch(torch.tensor([[[(1 - share) / 2] * 2 + [share / 2] * 2]]), torch.tensor([0]), torch.ones(1))
            watch.on_step_end(None, None, None)
            warnings.append(watch.collapse(arguments, len(warnings) + 1))

    steps(COLLAPSE_STEPS - 1, 0.019)
    steps(1, 0.021)
    steps(COLLAPSE_STEPS - 1, 0.019)
    assert not any(warnings)
    steps(COLLAPSE_STEPS, 0.019)
    (message,) = filter(None, warnings)
    assert warnings.index(message) == 2 * COLLAPSE_STEPS - 1
    for part in ("experts 2-3", "task type 1", "50 steps", "step 100", "--blc_weight", "--learning_rate"):
        assert part in message


def test_a_step_of_padding_examples_alone_neither_counts_nor_ends_a_collapse(arguments):
    watch, warnings = RoutingWatch(2, [2, 2]), []
    for weight in [1] * (COLLAPSE_STEPS - 1) + [0, 1]:
        watch.watch(torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), torch.tensor([0]), torch.tensor([weight]))
        watch.on_step_end(None, None, None)
        warnings.append(watch.collapse(arguments, len(warnings) + 1))
    assert not any(warnings[:-1])
    assert "50 steps (now step 51)" in warnings[-1]


def test_a_run_logs_its_routing_and_warns_of_a_collapse(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.routing_watch.COLLAPSE_STEPS", 2)
    monkeypatch.setattr("training.routing_watch.COLLAPSE_SHARE", 0.9)
    run(eval_strategy="no", validation_file=None)
    lines = [line for line in run.log() if "lm_loss" in line]
    assert len(lines) == 6
    assert all(line.keys() >= SCALARS for line in lines)
    events = EventAccumulator(str(run.output / "tensorboard"))
    events.Reload()
    for name in SCALARS:
        logged = [event.value for event in events.Scalars(f"train/{name}")]
        assert logged == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert capsys.readouterr().out.count("warning: the routing has collapsed") == 1


@pytest.mark.parametrize("settings", [{"lora_nums": 1}, {"tuning": "full", "learning_rate": 1e-3}])
def test_without_a_router_nothing_is_logged_or_plotted(run, settings):
    run(**settings, max_steps=2)
    assert not any(SCALARS & line.keys() for line in run.log())
    assert not list(run.output.glob("routing.*"))


def test_routing_of_an_adapter_from_the_hub_needs_a_folder(adapter_dir, monkeypatch):
    monkeypatch.setattr(trained, "snapshot_download", lambda name, allow_patterns: str(adapter_dir))
    with pytest.raises(InputError, match="someone/adapter is on the hub: give a folder for the files with --output"):
        plot_routing.main(["--adapter", "someone/adapter"])


def test_a_run_leaves_a_picture_with_its_training(run):
    run(max_steps=3)
    training = json.loads((run.output / "routing.json").read_text())["training"]
    assert training == {
        "run (blc_weight 0.1)": {
            "step": [1, 2, 3],
            "coefficient_of_variation": [line["routing_cv"] for line in run.log() if "lm_loss" in line],
            "entropy": [line["routing_entropy"] for line in run.log() if "lm_loss" in line],
        }
    }
    with Image.open(run.output / "routing.png") as picture:
        assert picture.width > 900


def summary(
    modules: list[str],
    num_experts: int,
    types: list[int],
    tasks: list[str],
    num_task_types: int = 2,
    null_expert: bool = False,
) -> dict:
    generator = torch.Generator().manual_seed(0)
    shares = torch.softmax(torch.randn(len(types), len(modules), num_experts, generator=generator), dim=-1)
    trained = num_experts - null_expert
    config = LoraConfig(lora_nums=trained, lora_null_expert=null_expert, num_task_types=num_task_types, blc_weight=0)
    return routing_summary(Routing(modules, shares.numpy(), np.array(types), np.array(tasks)), config)


def test_evenness_by_linear():
    found = summary(["a.0.up.experts.router", "a.1.up.experts.router"], 4, [0, 1], ["x", ""])
    assert found["modules"] == ["a.0.up", "a.1.up"]
    assert found["rows_by_task"] == {"x": 1}
    assert np.mean(found["entropy_by_module"]) == pytest.approx(found["entropy"], abs=1e-5)
    by_type = np.array(list(found["expert_share_by_task_type_and_module"].values()))
    load_LE = torch.tensor(by_type.mean(axis=0))
    expected = coefficient_of_variation(load_LE).tolist()
    assert found["coefficient_of_variation_by_module"] == pytest.approx(expected, abs=1e-4)


LAYERS = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(40) for name in ("gate", "up", "down")]
PICTURES = {
    "a model of usual size": (LAYERS, 8, [0, 1] * 5, [f"kind {index}" for index in range(10)]),
    "a null expert": (LAYERS, 7, [0, 1] * 5, [f"kind {index}" for index in range(10)], 2, True),
    "one Linear outside the layers": (["lm_head"], 2, [0], [""]),
    "many experts, many tasks": (LAYERS[:6], 64, [-1, 0, 1, 2, 3] * 8, [f"kind {index}" for index in range(40)], 4),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_any_model_are_small(tmp_path, name):
    values = summary(*PICTURES[name])
    values["prompt"] = {
        "tokens": ["$x_1$", "\n", "a very long token"] * 30,
        "expert_weights": [[1.0] * values["num_experts"]] * 90,
    }
    draw(tmp_path / "routing.png", values)
    assert 10_000 < (tmp_path / "routing.png").stat().st_size < 200_000


def test_plot_routing_writes_both_files_for_an_adapter_and_a_prompt(adapter_dir, data_file, tmp_path, capsys):
    output = tmp_path / "plots" / "new"
    flags = {"adapter": adapter_dir, "data": data_file, "output": output, "data_cache_dir": tmp_path, "batch_size": 5}
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    plot_routing.main([*words, "--prompt", "the cat sat"])
    values = json.loads((output / "routing.json").read_text())
    assert values["rows_by_task"] == {"closed_book_qa": 6, "summarization": 6}
    assert values["training"] == {}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(filled_base(adapter_dir)), adapter_dir)
    trained = plot_routing.load_trained(plot_routing.InferenceArguments(adapter=str(adapter_dir)))
    ids = encode_prompt(trained.tokenizer, "plain", "the cat sat", "")
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(torch.tensor([ids]))
    weights_TE = torch.stack([weights_BTE[0] for weights_BTE in recorder.weights.values()]).mean(dim=0)
    torch.testing.assert_close(torch.tensor(values["prompt"]["expert_weights"]), weights_TE, rtol=0, atol=1e-5)
    assert len(values["prompt"]["tokens"]) == len(ids)
    assert (output / "routing.png").is_file()
    shown = capsys.readouterr().out
    assert "  task type 1 (world knowledge)" in shown
    assert "coefficient of variation" in shown


def test_a_place_that_cannot_be_written_is_named_before_the_model_is_loaded(adapter_dir, data_file, tmp_path):
    words = ["--adapter", str(adapter_dir), "--data_cache_dir", str(tmp_path / "cache")]
    for output, data, message in (
        (data_file, data_file, f"cannot be made: {data_file} is not a folder"),
        (data_file / "new", data_file, f"cannot be made: {data_file} is not a folder"),
        (data_file.parent, data_file.parent, "would be read as input the next time"),
    ):
        with pytest.raises(InputError, match=message):
            plot_routing.main([*words, "--data", str(data), "--output", str(output), "--base_model", "./nowhere"])


def test_rows_and_prompts_longer_than_the_table_of_positions_are_refused(gpt2_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    get_peft_model(base, LoraConfig(lora_nums=2, r=2)).save_pretrained(tmp_path / "adapter")
    flags = ["--adapter", tmp_path / "adapter", "--data_cache_dir", tmp_path / "cache", "--data"]
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "x" * 80, "output": "y"}]))
    too_long = r"\d+ tokens, but this base model \(gpt2\) has 64 positions; shorten"
    with pytest.raises(InputError, match=rf"rows of {too_long} or remove the longer ones in .*long.json"):
        plot_routing.main([*map(str, flags), str(tmp_path / "long.json")])
    (tmp_path / "short.json").write_text(json.dumps([{"instruction": "x", "output": "y"}]))
    with pytest.raises(InputError, match=rf"--prompt has {too_long} it"):
        plot_routing.main([*map(str, flags), str(tmp_path / "short.json"), "--prompt", "x" * 80])


def filled_base(adapter_dir) -> str:
    return json.loads((adapter_dir / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_batches_of_rows_leave_gradients_switched_on(adapter_dir, data_file, tmp_path):
    trained = plot_routing.load_trained(plot_routing.InferenceArguments(adapter=str(adapter_dir)))
    _, rows = load_rows(trained, str(data_file), "validation_file", str(tmp_path))
    assert [torch.is_grad_enabled() for _ in batches(trained, rows, 5, "reading")] == [True] * 3


def test_plot_routing_compares_runs(run, adapter_dir, data_file, tmp_path):
    run(max_steps=2)
    run(max_steps=2, blc_weight=0, output_dir=tmp_path / "free")
    words = ["--adapter", str(run.output), "--runs", str(run.output), str(tmp_path / "free")]
    plot_routing.main([*words, "--data_cache_dir", str(tmp_path), "--output", str(tmp_path / "both")])
    training = json.loads((tmp_path / "both" / "routing.json").read_text())["training"]
    assert set(training) == {"run (blc_weight 0.1)", "free (no constraint)"}
    namesake = shutil.copytree(run.output, tmp_path / "other" / run.output.name)
    both = plot_routing.read_curves([str(run.output), str(namesake)])
    assert set(both) == {f"{run.output} (blc_weight 0.1)", f"{namesake} (blc_weight 0.1)"}
    with pytest.raises(InputError, match=r"adapter is not a run folder: it does not have trainer_state.json"):
        plot_routing.main(["--adapter", str(run.output), "--runs", str(adapter_dir)])
    with pytest.raises(InputError, match="--prompt is empty"):
        plot_routing.main(["--adapter", str(run.output), "--prompt", " "])


def test_a_checkpoint_is_plotted_like_the_run_that_it_is_of(run, tmp_path):
    run(max_steps=2)
    words = ["--data_cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "plot")]
    plot_routing.main(["--adapter", str(run.output / "checkpoint-2"), *words])
    summary = json.loads((tmp_path / "plot" / "routing.json").read_text())
    assert set(summary["training"]) == {"checkpoint-2 (blc_weight 0.1)"}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is a link to .*nowhere, which does not exist"):
        plot_routing.main(["--adapter", str(run.output), "--output", str(tmp_path / "link")])
    with pytest.raises(InputError, match="--prompt has a byte that is not UTF-8"):
        plot_routing.main(["--adapter", str(run.output), "--prompt", "caf\udce9"])


def test_a_run_whose_files_are_damaged_has_no_curves(adapter_dir):
    state, config = adapter_dir / "trainer_state.json", adapter_dir / "run_config.json"
    config.write_text('{"blc_weight": 0.1}')
    for damaged in ("[]", "{}", '{"log_history": 3}', '{"log_history": [3]}', '{"log_history": [{"routing_cv": 1}]}'):
        state.write_text(damaged)
        with pytest.raises(InputError, match=r"trainer_state.json or run_config.json of .*adapter is damaged \("):
            plot_routing.read_curves([adapter_dir])
    config.write_text('{"blc_weight": "0.1"}')
    with pytest.raises(InputError, match=r"run_config.json: 'blc_weight' is \"0.1\", but has to be a number"):
        plot_routing.read_curves([adapter_dir])


def test_an_adapter_without_a_router_has_nothing_to_plot(adapter_dir, model_dir, tmp_path, capsys):
    filled_model(lora_nums=1, base_model_name_or_path=str(model_dir)).save_pretrained(adapter_dir)
    for folder in (adapter_dir, model_dir):
        plot_routing.main(["--adapter", str(folder), "--output", str(tmp_path / "none")])
        assert "does not have a router" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_routers_on_several_devices_are_recorded_on_the_first():
    """Of devices that are not here, fake tensors still refuse every operation that mixes two."""
    with FakeTensorMode():
        recorder = RoutingRecorder(torch.nn.Module())
        recorder.weights = {str(n): torch.full((3, 9, 4), 0.25, device=f"cuda:{n}") for n in range(2)}
        mask_BT = torch.ones(3, 9, device="cuda:0")
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.stack(list(recorder.weights.values()))
        shares_LBE = recorder.sample_shares(mask_BT)
        assert shares_LBE.shape == (2, 3, 4)
        assert shares_LBE.device == torch.device("cuda:0")
