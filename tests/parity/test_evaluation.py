"""`knltrain eval` of files that torchvision's users have, beside a plain loop over torchvision's own data pipeline."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_jpeg
from safetensors.torch import save_file
from torch import nn

from knltrain.cli.main import main

SIZE, RESIZE, CLASSES = 64, 80, 4


def evaluate(*arguments):
    """The command, in this process: another one takes seconds to start."""
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 JPEGs of sizes on both sides of RESIZE, and some that need no scaling, in ImageFolder layout."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(60):
        height, width = rng.integers(50, 300, 2) if index % 6 else (RESIZE, RESIZE + index)
        label = int(rng.integers(CLASSES)) if index >= CLASSES else index
        write_jpeg(root / "val" / f"class{label}" / f"{index:03}.jpg", height, width, index)
    return root


def batches_of(torchvision, root):
    transforms = torchvision.transforms
    pipeline = transforms.Compose(
        [
            transforms.Resize(RESIZE),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    folder = torchvision.datasets.ImageFolder(str(root / "val"), pipeline)
    return list(torch.utils.data.DataLoader(folder, batch_size=20))


def spread(model, batches):
    """Gives a fresh network statistics of these images, and logits of which now one and now another is the largest."""
    images = torch.cat([images for images, _ in batches])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all passes, of which there is one
    with torch.no_grad():
        model.train()
        model(images)
        logits = model.eval()(images)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= logits.mean(0)
    return model


@pytest.mark.parametrize(
    "theirs, ours, file",
    [
        ("resnet50", "resnet50", "resnet50.pth"),
        pytest.param("resnet50", "resnet50", "resnet50.safetensors", marks=pytest.mark.hand),
        ("resnet18", "torchvision:resnet18", "reference.pth"),
        ("alexnet", "torchvision:alexnet", "alexnet.safetensors"),
    ],
)
def test_top1_is_the_plain_loops_to_the_image(torchvision, pictures, tmp_path, theirs, ours, file):
    torch.manual_seed(0)
    batches = batches_of(torchvision, pictures)
    model = spread(torchvision.models.get_model(theirs, num_classes=CLASSES), batches)
    right = in_five = count = 0
    predicted = set()
    with torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            right += int((logits.argmax(1) == labels).sum())
            in_five += len(labels)  # of four classes
            count += len(labels)
            predicted |= set(logits.argmax(1).tolist())
    assert len(predicted) == CLASSES
    assert 0 < right < count
    state = model.state_dict()
    if file.endswith(".safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save({"model": state, "epoch": 1} if file == "reference.pth" else state, tmp_path / file)
    result = evaluate(tmp_path / file, "--data", pictures, "--model", ours, "--image-size", SIZE,
                      "--augment.resize", RESIZE, "--precision", "fp32", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["images"] == count
    assert round(found["top1"] * count / 100, 6) == right
    assert round(found["top5"] * count / 100, 6) == in_five


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, "--model must name the network"),
        (["--model", "resnet50"], 1, "is of another network"),
        (["--model", "alexnet_bn_small"], 1, "/val has 4 classes, and"),
    ],
)
def test_what_a_file_cannot_be_is_one_line(pictures, tmp_path, arguments, code, words):
    from knltrain.models import build_model

    network = build_model("alexnet_bn_small", num_classes=9, image_size=32)
    save_file(network.state_dict(), tmp_path / "nine.safetensors")
    result = evaluate(tmp_path / "nine.safetensors", "--data", pictures, "--image-size", 32, *arguments)
    assert result.exit_code == code
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_checkpoint_says_itself_what_it_is_of(tmp_path):
    result = evaluate(tmp_path, "--data", "synthetic", "--image-size", "64")
    assert result.exit_code == 2
    assert "--image-size has no effect on" in result.stderr
