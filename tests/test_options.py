"Chapter 66, second half: what is held at zero is zero, and a stage that was killed ends where an undisturbed one does."
import json
from dataclasses import asdict

import pytest
import torch
import yaml

import tiny
from qualivision.experiments import ablation
from qualivision.models.bodies import save_body
from qualivision.models.dover_mos import DoverPlusPlus
from qualivision.models.measures import filter_statistics, grid_tokens, input_channels, pool_statistics
from qualivision.models.text import TextEncoder
from qualivision.pipeline.params import ParamsError
from qualivision.pretraining.tasks import asking
from qualivision.toy import toy_set


@pytest.fixture(scope="module")
def model() -> DoverPlusPlus:
    torch.manual_seed(0)
    return DoverPlusPlus(asking(tiny.CONFIG))


def seen(net, *inputs) -> dict:
    "The output of every module in which something can be held."
    found = {}

    def keep(at): return lambda module, inputs, output: found.update({at: output.detach()})
    for at in ablation.columns_of(net): net.get_submodule(at).register_forward_hook(keep(at))
    net(*inputs)
    return found


@pytest.mark.parametrize("option, count", [("wide", 72), ("mean", 32), ("stillness", 32), ("bank", 2 * 864), ("token_spread", 2 * 32)])
def test_what_is_held_is_zero_and_nothing_else(option, count, model):
    "Also in a copy, such as the moving average of the weights, in training and in validation."
    from copy import deepcopy
    held = deepcopy(model)
    assert ablation.hold(held, option) == count
    frames = torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8)
    for net in (held.train(), deepcopy(held).eval()):
        outputs = seen(net, frames, torch.randn(3, 384))
        zeros = 0
        for at, names in ablation.columns_of(net).items():
            for column, name in zip(outputs[at].flatten(0, -2).T, names):
                if option not in name.split(): continue
                zeros += 1
                assert not column.any(), (at, name)
        assert zeros == count
    other = outputs["dover_model.pooled_norm" if option != "mean" else "fusion.token_norm"]
    assert (other != 0).float().mean() > .5


def test_columns_are_where_the_network_puts_them(model):
    "Each statistic computed alone stands in the columns of its name; so do the means in a token."
    c, frames, names = model.config, torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8), ablation.columns_of(model)
    with torch.no_grad():
        known, (stem, *maps) = model.look(frames), model.dover_model.backbone(input_channels(frames), stem=True)
    want = {n: torch.cat([pool_statistics(maps[s], (n,), c.log_statistics) for s in c.stages], 1) for n in c.statistics}
    for name, values in {"wide": filter_statistics(stem), **want}.items():
        here = torch.tensor([n == name for n in names["dover_model.pooled_norm"]])
        assert torch.allclose(known["pooled"][:, here], values), name
    means = torch.tensor([n == "" for n in names["fusion.token_norm"]])
    assert torch.allclose(known["tokens"][..., means], grid_tokens([maps[s] for s in c.token_stages], c.grid, False))


def test_an_option_that_a_model_has_not(model):
    with pytest.raises(ParamsError, match="colours.*nothing of this name"): ablation.hold(model, "colours")


@pytest.fixture(scope="module")
def ground(tmp_path_factory, model):
    "A tiny data set, a tiny body, and parameters for two steps of each run."
    at = tmp_path_factory.mktemp("options")
    toy_set(at/"data", train=2, val=3)
    about = {"config": asdict(model.config), "trained_on": "nothing", "text_encoder": "minilm", "text_encoder_key": TextEncoder("minilm").key}
    save_body(at/"body", model, about)
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(tiny.CONFIG).items() if k not in ("causes", "attributes")}
    section = {"model": {"config": "embedded", **given, "freeze_backbone": True}, "pretrained": str(at/"body"),
               "train": {"batch_size": 4, "accumulation": 1, "lr": 1e-3, "warmup_steps": 0, "augment": False, "device": "cpu", "precision": "fp32",
                         "ema": .5, "save_every": 1}}
    profile = {"text": {"encoder": "minilm"}, "pretrain": {}, "dover": section, "vjepa2": {},
               "options": {"seeds": [0, 1], "train": {"epochs": 2}, "dover": ["bank", "mean"]}}
    data = {"root": str(at/"data"), "seed": 0, "val_fraction": .1, "test_fraction": .1}
    (at/"params.yaml").write_text(yaml.safe_dump({"profile": "tiny", "data": data, "tiny": profile}))
    return at


def stage(folder, ground, monkeypatch):
    "Runs the stage in a folder; what options.json holds."
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    ablation.main("options", ground/"params.yaml")
    return (folder/"results"/"experiments"/"options.json").read_bytes()


def test_a_stage_that_was_killed_ends_as_an_undisturbed_one(ground, tmp_path, monkeypatch):
    from qualivision.training import loop
    whole = stage(tmp_path/"whole", ground, monkeypatch)
    found = json.loads(whole)
    rows = found["differences"]["dover"]
    assert list(rows) == ["unchanged", "bank", "mean"] and not found["not_run"] and rows["mean"]["difference"]["score"]["mean"] != 0
    step, taken = loop.take_step, []

    def dies(run, group):
        if len(taken) == 5: raise KeyboardInterrupt                # in the middle of the third run, of two steps each
        taken.append(run.step)
        return step(run, group)
    monkeypatch.setattr(loop, "take_step", dies)
    with pytest.raises(KeyboardInterrupt): stage(tmp_path/"killed", ground, monkeypatch)
    left = json.loads((tmp_path/"killed"/"results"/"experiments"/"options.json").read_text())
    assert left["not_run"][0] == "dover: bank, seed 0" and list(left["differences"]["dover"]) == ["unchanged"]
    monkeypatch.setattr(loop, "take_step", lambda run, group: taken.append(run.step) or step(run, group))
    assert stage(tmp_path/"killed", ground, monkeypatch) == whole
    assert taken == [0, 1] * 6                                     # no step was taken twice
