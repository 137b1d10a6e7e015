"""How networks are distilled: what the teacher says and keeps, what the student starts from, the terms, the command."""

import copy
import functools
import json
import shlex

import pytest
import torch
import torch.nn.functional as F

import datasets
import distill
import losses
import models
import quantize
import train
from models import ModelError, build_model, load_checkpoint, read_checkpoint, save_checkpoint

DATA = "--size 42 56 --crop 42 56 --batch-size 2 --threads 1 --workers 0"
FAMILIES = {
    "dinov2": dict(backbone="dinov2-tiny", head="fpn"),
    "mit": dict(backbone="mit-tiny", head="segformer"),
    "resnet": dict(backbone="resnet18", head="fcn"),
    "enet": dict(model="enet"),
    "mask2former": dict(model="mask2former-tiny"),
}


@pytest.fixture(scope="module")
def info():
    return datasets.open_dataset("synthetic", "val", length=1, size=(42, 56)).info


@pytest.fixture
def checkpoint(info, tmp_path, figures_once):
    """checkpoint(name, **build) -> path of a network that has learned nothing, but is not at its start either."""

    def write(name="teacher", *, seed=0, classes=None, compression=(), **build):
        torch.manual_seed(seed)
        data = info.to_dict() | ({"classes": classes, "palette": [[0, 0, 0]] * len(classes)} if classes else {})
        model = build_model(num_classes=len(data["classes"]), **build or FAMILIES["dinov2"])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        flags = dict(size=(42, 56), crop=(42, 56), batch_size=2)
        path = tmp_path / f"{name}.pt"
        save_checkpoint(path, model, data=data, pretrained="no", command="python train.py", args=flags)
        return path

    return write


def run(flags, path, out, *, dry="--dry-run"):
    return distill.main(shlex.split(f"--weights {path} --out {out} {DATA} {flags} {dry}"))


def images(count=2, size=(42, 56), seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def labels(classes, count=2, size=(42, 56)):
    target = torch.randint(0, classes, (count, *size), generator=torch.Generator().manual_seed(2))
    target[:, :8] = 255
    return target


def distiller(student, teachers, weights, **options):
    ce = functools.partial(losses.cross_entropy, ignore_index=255)
    options = dict(aux_weight=0.4, ignore_index=255, temperature=2.0, boundary={}) | options
    return distill.Distiller(student, ce, distill.Teacher(teachers), weights, **options)


# ---- teacher --------------------------------------------------------------------------------------------------------


def test_one_teacher_gives_its_own_logits_and_several_the_mean_of_their_softmax():
    torch.manual_seed(0)
    networks = [build_model(num_classes=4, **FAMILIES[name]).eval() for name in ("resnet", "dinov2")]
    x = images(size=(40, 50))  # padded to both strides
    with torch.no_grad():
        expected = [network(x) for network in networks]
        mirrored = [network(x.flip(-1)).flip(-1) for network in networks]
        logits, covers, *_ = distill.Teacher(networks[:1]).answer(x)
        assert logits.shape[-2:] == (5, 7)  # as before they are resized
        assert covers == (40, 56)
        torch.testing.assert_close(networks[0].resize(logits, (40, 50)), expected[0])
        torch.testing.assert_close(distill.Teacher(networks[:1]).decode([x]), expected[0])
        for flip, each in ((False, expected), (True, expected + mirrored)):
            mean = torch.stack([y.softmax(1) for y in each]).mean(0)
            torch.testing.assert_close(distill.Teacher(networks, flip=flip).answer(x).logits.softmax(1), mean)


def test_a_teacher_stays_as_it_is():
    torch.manual_seed(0)
    student, teacher = (build_model(num_classes=4, **FAMILIES["resnet"]) for _ in range(2))
    before = copy.deepcopy(teacher.state_dict())
    objective = distiller(student, [teacher], {"ce": 1.0, "kl": 1.0, "cosine": 1.0, "mgd": 1.0}).train()
    optimizer = train.make_optimizer(objective, "sgd", lr=0.1, backbone_lr=0.1, weight_decay=0.1)
    train.train_step(objective, optimizer, images(), labels(4))
    assert all(torch.equal(before[k], x) for k, x in teacher.state_dict().items())  # BatchNorm's statistics too
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not any("asked" in name or "networks" in name for name in objective.state_dict())


@pytest.mark.parametrize("mode", ["response", "feature", "cwd+dist"])
def test_a_quantized_teacher_teaches_nearly_what_the_float_one_does(mode, checkpoint, tmp_path):
    float_teacher = checkpoint("float", **FAMILIES["resnet"])
    quantize.main(shlex.split(f"--weights {float_teacher} --out {tmp_path}/q --calib-images 2 {DATA} --dry-run"))
    found = []
    for path in (float_teacher, tmp_path / "q" / "best.pt"):
        teacher, _ = load_checkpoint(path)
        torch.manual_seed(0)
        student = build_model(num_classes=teacher.build["num_classes"], **FAMILIES["mit"])
        weights = distill.term_weights(mode.split("+"), False, {})
        objective = distiller(student, [teacher], weights)
        found.append(objective(images(), labels(teacher.build["num_classes"])))
        found[-1].backward()
        with torch.autocast("cpu", torch.bfloat16):
            objective(images(), labels(teacher.build["num_classes"])).backward()
    assert found[0] != found[1]
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0)


# ---- terms ----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_mode_and_joined_by_the_strongest():
    weights = distill.term_weights
    assert weights(["response"], True, {}) == {"ce": 0.5, "kl": 0.5}
    assert weights(["feature"], True, {}) == {"ce": 0.5, "kl": 0.25, "alp": 0.25}
    assert weights(["feature"], False, {}) == {"ce": 1.0, "cosine": 0.1, "cosine_last": 0.5}
    assert weights(["feature", "response"], True, {}) == {"ce": 0.5, "kl": 0.5, "alp": 0.25}
    assert weights(["dist"], False, {"kl": 2.0, "ce": None, "dist": 0.0}) == {"ce": 1.0, "kl": 2.0}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    torch.manual_seed(0)
    student, teacher = (build_model(num_classes=4, **FAMILIES["resnet"]).eval() for _ in range(2))
    x, y = images(), labels(4)
    weights = {"ce": 0.5, "kl": 0.25, "cwd": 3.0, "dist": 2.0, "cosine": 0.1, "cosine_last": 0.5}
    objective = distiller(student, [teacher], weights).eval()
    logits, wanted = (network.decode(network.encode(x)) for network in (student, teacher))
    assert logits.shape[-2:] == (6, 7)
    small = F.pad(y, (0, 0, 0, 6), value=255)[:, 4::8, 4::8]
    maps, theirs = student.encode(x), teacher.encode(x)
    covered = F.pad((y != 255).float(), (0, student.padded((42, 56))[1] - 56, 0, student.padded((42, 56))[0] - 42))
    valid = [F.adaptive_max_pool2d(covered, f.shape[-2:]) > 0 for f in maps]
    cosines = [losses.cosine_distillation(*row) for row in zip(maps, theirs, valid, strict=True)]
    shared = dict(teacher=wanted)
    expected = {
        "ce": F.cross_entropy(student(x), y, ignore_index=255),
        "kl": losses.distillation(logits, small, temperature=2.0, **shared),
        "cwd": losses.channel_distillation(logits, small, **shared),
        "dist": losses.relation_distillation(logits, small, **shared),
        "cosine": sum(cosines[:-1]) / 3,
        "cosine_last": cosines[-1],
    }
    total = objective(x, y)
    torch.testing.assert_close(total, sum(weights[k] * expected[k] for k in weights))
    reported = objective.report()
    assert reported.keys() == weights.keys()
    for term, value in reported.items():
        assert value == pytest.approx((weights[term] * expected[term]).item(), rel=1e-4)
    assert set(objective.report().values()) == {0.0}  # those of the steps since then


def test_a_boundary_is_as_wide_in_pixels_at_the_stride_of_the_logits():
    torch.manual_seed(0)
    student, teacher = (build_model(num_classes=4, **FAMILIES["resnet"]).eval() for _ in range(2))
    x, y = images(), torch.arange(56).div(20, rounding_mode="floor").expand(2, 42, 56)  # boundaries at columns 20, 40
    found = {}
    for pixels in (8, 40):  # a cell of eight, and five
        boundary = dict(boundary_weight=3.0, boundary_width=pixels)
        found[pixels] = distiller(student, [teacher], {"kl": 1.0}, boundary=boundary).eval()(x, y)
        logits, wanted = (network.decode(network.encode(x)) for network in (student, teacher))
        small = F.pad(y, (0, 0, 0, 6), value=255)[:, 4::8, 4::8]
        shared = dict(teacher=wanted, temperature=2.0, boundary_weight=3.0, boundary_width=pixels // 8)
        torch.testing.assert_close(found[pixels], losses.distillation(logits, small, **shared))
    assert found[8] != found[40]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("taught", [name for name in FAMILIES if name != "mask2former"])
def test_every_family_learns_from_every_other_for_a_step(name, taught):
    torch.manual_seed(0)
    teacher, student = (build_model(num_classes=4, **FAMILIES[n]) for n in (name, taught))
    tokens = distill.has_tokens(student) and distill.has_tokens(teacher)
    weights = distill.term_weights(["response", "feature", "cwd", "dist", "mgd"], tokens, {})
    objective = distiller(student, [teacher], weights).train()
    optimizer = train.make_optimizer(objective, "adamw", lr=1e-3, backbone_lr=1e-3, weight_decay=0.0)
    for _ in range(2):  # a classifier that starts at 0 has nothing for the layers below at first
        train.train_step(objective, optimizer, images(), labels(4))
    assert all(torch.isfinite(torch.tensor(x)) and x > 0 for x in objective.report().values())
    dead = [k for k, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [k for k in dead if "head" in k or "extra" in k]


@pytest.mark.parametrize(("hidden", "projected"), [(32, False), (48, True)])
def test_tokens_of_another_width_are_projected(hidden, projected):
    from conftest import add_row

    add_row(models.BACKBONES, "dinov2-other", "dinov2-tiny", hidden_size=hidden, num_hidden_layers=3)
    torch.manual_seed(0)
    student = build_model(num_classes=4, backbone="dinov2-other", head="linear")
    teacher = build_model(num_classes=4, **FAMILIES["dinov2"])
    objective = distiller(student, [teacher], {"ce": 1.0, "alp": 1.0})
    objective(images(), labels(4)).backward()
    assert objective.attention.shape == (3, 5)  # 3 layers; the embedding and 4 layers
    torch.testing.assert_close(objective.attention.sum(1), torch.ones(3))
    assert bool(list(objective.extra.parameters())) == projected
    assert all(p.grad.any() for p in objective.extra.parameters())


def test_layer_projection_needs_tokens_on_both_sides():
    student, teacher = (build_model(num_classes=4, **FAMILIES[n]) for n in ("resnet", "dinov2"))
    with pytest.raises(ModelError, match="--alp"):
        distiller(student, [teacher], {"alp": 1.0})


# ---- what the student starts from -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "layers"), [("lower", (0, 1, 2)), ("even", (0, 1, 3))])
def test_a_shallower_student_starts_from_layers_of_the_teacher(which, layers):
    torch.manual_seed(0)
    teacher = build_model(num_classes=4, **FAMILIES["dinov2"])
    student = build_model(num_classes=4, layers=3, **FAMILIES["dinov2"])
    text = distill.start_from(student, teacher, which)
    assert text.endswith(f"layers {', '.join(str(i + 1) for i in layers)} of 4")
    own, theirs = student.backbone.body.encoder.layer, teacher.backbone.body.encoder.layer
    for mine, i in zip(own, layers, strict=True):
        for a, b in zip(mine.parameters(), theirs[i].parameters(), strict=True):
            assert torch.equal(a, b)
    for mine, its in zip(student.head.parameters(), teacher.head.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_student_of_all_layers_is_the_teacher_and_one_of_another_family_gets_nothing():
    torch.manual_seed(0)
    teacher = build_model(num_classes=4, **FAMILIES["dinov2"]).eval()
    twin = build_model(num_classes=4, **FAMILIES["dinov2"]).eval()
    distill.start_from(twin, teacher, "even")
    with torch.no_grad():
        assert torch.equal(twin(images()), teacher(images()))
    with pytest.raises(ModelError, match="--init scratch"):
        distill.start_from(build_model(num_classes=4, **FAMILIES["resnet"]), teacher, "lower")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_shallow_student_beside_a_control(checkpoint, tmp_path):
    done = run("--mode feature", checkpoint(), tmp_path / "out")
    student, saved = load_checkpoint(tmp_path / "out" / "best.pt")
    _, other = load_checkpoint(tmp_path / "out" / "control" / "best.pt")
    teacher, parent = load_checkpoint(tmp_path / "teacher.pt")
    assert len(student.backbone.body.encoder.layer) == 3
    assert saved["build"] == other["build"]
    assert saved["compression"] == []
    assert saved["lineage"][-1]["id"] == parent["id"]
    assert other["lineage"] == saved["lineage"]  # it has the teacher's lower layers
    assert saved["state_dict"].keys() == student.state_dict().keys()  # no projection, no teacher
    assert done["miou_control"] == [pytest.approx(done["gain"] * -1 + done["miou"])]
    assert done["before"]["miou"] == done["miou_teacher"]
    assert done["before"]["params"] == models.count_params(teacher)[0] > done["params"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["terms"] == {"ce": 0.5, "kl": 0.25, "alp": 0.25}
    for name in ("terms", "layers", "curves", "examples"):
        assert (tmp_path / "out" / f"{name}.png").exists()
    header = (tmp_path / "out" / "history.csv").read_text().splitlines()[0]
    assert {"ce", "kl", "alp"} <= set(header.split(","))


def test_without_distillation_student_and_control_are_the_same_to_the_bit(checkpoint, tmp_path):
    path = checkpoint(backbone="mit-tiny", head="fcn")
    run("--mode response --kl-weight 0 --ce-weight 1 --seeds 2", path, tmp_path / "out")
    for folder in ("", "seed-1"):
        ours, control = (
            read_checkpoint(tmp_path / "out" / folder / c / "best.pt")["state_dict"] for c in ("", "control")
        )
        assert all(torch.equal(ours[k], control[k]) for k in ours)
    first, second = (read_checkpoint(tmp_path / "out" / f / "best.pt")["state_dict"] for f in ("", "seed-1"))
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_2n_steps_are_n_and_n_more_with_projections_and_average(checkpoint, tmp_path, monkeypatch):
    path = checkpoint(backbone="mit-tiny", head="fcn")
    flags = "--mode response+feature+mgd --model enet --ema 0.9 --no-control"
    open_dataset = datasets.open_dataset

    def few(name, split, **options):
        return open_dataset(name, split, **options | {"length": 4 if split == "train" else 2})

    monkeypatch.setattr(datasets, "open_dataset", few)
    run(f"{flags} --epochs 2", path, tmp_path / "whole", dry="")
    fit = train.fit

    def stop(*args, **options):
        return fit(*args, **options | {"max_steps": 3}) | {"stopped": "SIGTERM"}

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stop)
        done = run(f"{flags} --epochs 2", path, tmp_path / "parts", dry="")
    assert done["stopped"] == "SIGTERM"
    distill.main(["--resume", "--out", str(tmp_path / "parts")])
    whole, parts = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["state_dict"][k], parts["state_dict"][k]) for k in whole["state_dict"])
    ours, theirs = (c["training"]["objective"] for c in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert any(k.startswith("extra.generator") for k in ours)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_equal_minutes_give_the_control_more_epochs(checkpoint, tmp_path, capsys):
    path = checkpoint(backbone="mit-tiny", head="unet")
    done = run("--mode response --backbone mit-tiny --head fcn --minutes 1", path, tmp_path / "out")
    assert done["epochs"]["control"] > done["epochs"]["student"] > 1
    assert "ms a step" in capsys.readouterr().out


def test_a_pruned_student_goes_on_as_it_is(checkpoint, tmp_path):
    import prune

    path = checkpoint(backbone="mit-tiny", head="fcn")
    for flags, folder in (("--structured --amount 0.3 --round-to 2", "thin"), ("--amount 0.5", "sparse")):
        prune.main(shlex.split(f"--weights {path} --out {tmp_path / folder} --epochs 0 {DATA} {flags} --dry-run"))
        student = tmp_path / folder / "best.pt"
        run(f"--mode feature --student {student} --no-control", path, tmp_path / "out")
        before, after = (load_checkpoint(p) for p in (student, tmp_path / "out" / "best.pt"))
        assert after[1]["compression"] == before[1]["compression"]
        assert [row["id"] for row in after[1]["lineage"]][-1] == read_checkpoint(path)["id"]
        for name, x in before[0].state_dict().items():
            assert after[0].state_dict()[name].shape == x.shape
            if folder == "sparse" and x.ndim > 1:
                assert not after[0].state_dict()[name][x == 0].any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode respons", None),
        ("--mode dist+dist", None),
        ("--kl-weight -1", None),
        ("--init teacher --model enet", "no tensor of the teacher's backbone fits"),
        ("--student {out}/other.pt", "has the classes a, b"),
        ("--teachers {out}/other.pt", "has the classes a, b"),
        ("--student {out}/teacher.pt --model enet", "--student brings its network"),
        ("--student {out}/teacher.pt --init teacher", "weights of its own"),
        ("--alp-weight 1 --model enet", "--alp"),
        ("--layers 9", "takes 3 to 4"),
        ("--model mask2former-tiny", "it can teach, but not be taught"),
        ("--weights {out}/nothing.pt", "no checkpoint at"),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, checkpoint, tmp_path):
    path = checkpoint()
    checkpoint("other", classes=["a", "b"])
    with pytest.raises(SystemExit if words is None else ModelError, match=words):
        run(flags.format(out=tmp_path), path, tmp_path / "out")
    assert not (tmp_path / "out" / "best.pt").exists()
