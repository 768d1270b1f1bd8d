"""The depthwise convolution in Triton: which way a layer takes, and in Triton's interpreter, on a CPU, its numbers against float64.

The interpreter replaces the compiler when triton is imported, so it has a process of its own."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

import qualivision.models.convnext3d as convnext3d
import qualivision.models.depthwise_gpu as gpu
from qualivision.models.convnext3d import DepthwiseConv3d

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is an extra: pip install -e '.[gpu]'")
CASES = [((1, 5, 3, 3, 5), (3, 7, 7), "float32"), ((3, 3, 1, 2, 19), (1, 3, 5), "float32"),
         ((1, 2, 2, 3, 5), (7, 7, 7), "float32"), ((3, 3, 1, 9, 4), (1, 3, 5), "bfloat16")]


def off(shape: tuple, kernel: tuple, dtype: torch.dtype, device="cpu") -> list[float]:
    "A layer's output and three gradients against nn.Conv3d's in float64: the largest error of each, as a share of its largest value."
    torch.manual_seed(0)
    layer, x, grad = DepthwiseConv3d(shape[1], kernel), torch.randn(shape), torch.randn(shape)
    x, grad = (a.to(device, dtype).contiguous(memory_format=torch.channels_last_3d) for a in (x, grad))
    def all_of(forward, x, grad, weight, bias):
        y = forward(x.requires_grad_())
        return [y, *torch.autograd.grad(y, [x, weight, bias], grad)]
    layer = layer.to(device)
    found = all_of(layer, x, grad, layer.weight, layer.bias)
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d) and found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == layer.weight.dtype, "the kernel's gradient has the kernel's format"
    x, grad, weight, bias = (a.detach().to("cpu", torch.float64) for a in (x, grad, layer.weight, layer.bias))
    weight.requires_grad_(), bias.requires_grad_()
    exact = all_of(lambda x: F.conv3d(x, weight, bias, padding=layer.padding, groups=shape[1]), x, grad, weight, bias)
    return [float((a.detach().cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact)]


def interpreted():
    "What the child computes: every case through the layer, which is told to take Triton on a CPU; the choice; the same bits twice."
    convnext3d._ways = lambda x, kernel: (gpu.convolve, gpu.kernel_gradient)
    answers = {"off": [off(shape, kernel, getattr(torch, dtype)) for shape, kernel, dtype in CASES]}
    answers["chosen"] = gpu.fast(torch.device("cpu"), torch.float32, (1, 3, 3)) == (gpu.convolve, gpu.kernel_gradient)
    x = torch.randn(1, 2, 2, 4, 20)                # not channels-last: copied, not misread
    answers["copied"] = torch.equal(gpu.convolve(x, torch.ones(2, 1, 1, 1, 1), None), x)
    gpu.convolve = lambda x, *rest: x              # a compiler with a fault
    answers["fault"] = gpu.fast(torch.device("cpu"), torch.float32, (1, 1, 3)) is None
    print(json.dumps(answers))


@needs_triton
def test_interpreted_numbers_are_those_of_float64(root):
    paths = os.pathsep.join([str(root), str(root/"tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", "import test_depthwise_gpu as t; t.interpreted()"], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (shape, kernel, dtype), errors in zip(CASES, answers.pop("off")):
        assert max(errors) < (1e-5 if dtype == "float32" else 1e-2), (shape, kernel, dtype, errors)
    assert answers == {"chosen": True, "copied": True, "fault": True}
    assert done.stderr.count("PyTorch's own") == 1 and "it is off by" in done.stderr


class OnGpu(torch.Tensor):
    "A tensor of the CPU that says it lies on a GPU."
    is_cuda, device = True, torch.device("cuda", 0)


def test_a_layer_on_a_gpu_takes_the_kernel_or_says_why_not(monkeypatch, capsys):
    layer, x = DepthwiseConv3d(3, (1, 3, 5)), torch.randn(2, 3, 2, 5, 7)
    plain, asked = F.conv3d(x, layer.weight, layer.bias, padding=layer.padding, groups=3), []
    def double(*given): return 2 * convnext3d._convolve(*given)
    def fast(*given): return asked.append(given) or (double, convnext3d._kernel_gradient)
    monkeypatch.setattr(gpu, "fast", fast)
    assert torch.allclose(layer(x.as_subclass(OnGpu)).as_subclass(torch.Tensor), 2 * plain, atol=1e-5)
    assert asked == [(torch.device("cuda", 0), torch.float32, (1, 3, 5))]
    monkeypatch.undo()
    gpu.fast.cache_clear()
    monkeypatch.setattr(gpu, "triton", None)
    for _ in range(2): assert torch.allclose(layer(x.as_subclass(OnGpu)).as_subclass(torch.Tensor), plain, atol=1e-5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1×3×5 on cuda:0: PyTorch's own" in said and "triton is not installed" in said
    gpu.fast.cache_clear()


def test_a_format_that_it_lacks_is_said(monkeypatch, capsys):
    "Sums in float32 would be less than float64 promises."
    monkeypatch.setattr(gpu, "triton", object())
    assert gpu.fast(torch.device("cuda"), torch.float64, (3, 3, 3)) is None
    assert "torch.float64" in capsys.readouterr().err
    gpu.fast.cache_clear()


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("shape, kernel, dtype", [*CASES, ((2, 96, 9, 41, 37), (7, 7, 7), "float32"), ((2, 96, 9, 41, 37), (7, 7, 7), "bfloat16")])
def test_gpu_numbers_are_those_of_float64(shape, kernel, dtype):
    assert gpu.fast(torch.device("cuda", torch.cuda.current_device()), getattr(torch, dtype), kernel) is not None
    assert max(off(shape, kernel, getattr(torch, dtype), "cuda")) < (1e-4 if dtype == "float32" else 1e-2)


@pytest.mark.cuda
@needs_triton
def test_gpu_gradient_has_the_same_bits_twice():
    x, grad = (torch.randn(2, 40, 5, 33, 31, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(*(gpu.kernel_gradient(x, grad, (40, 1, 3, 7, 7)) for _ in range(2)))
