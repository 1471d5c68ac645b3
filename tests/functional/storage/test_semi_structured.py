import pytest
import torch
import torch.nn.functional as F

from nowag_pl.functional.storage.semi_structured import reason_against_semi_structured, semi_structured

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_speaks_against(dtype, hopper):
    assert reason_against_semi_structured((64, 128), (2, 4), dtype, CUDA) is None


@pytest.mark.parametrize(
    ("shape", "pattern", "dtype", "device", "reason"),
    [
        ((64, 64), (1, 4), torch.float16, CUDA, "pattern (1, 4) instead of (2, 4)"),
        ((64, 64), None, torch.float16, CUDA, "pattern None"),
        ((64, 64), (2, 4), torch.float32, CUDA, "torch.float32 instead"),
        ((64, 96), (2, 4), torch.float16, CUDA, "shape (64, 96), no multiple of 64"),
        ((32, 64), (2, 4), torch.float16, CUDA, "shape (32, 64)"),
        ((64, 64), (2, 4), torch.float16, torch.device("cpu"), "on cpu, not on CUDA"),
    ],
)
def test_reasons(shape, pattern, dtype, device, reason, hopper):
    assert reason_against_semi_structured(shape, pattern, dtype, device).startswith(reason)


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_capability(capability, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = reason_against_semi_structured((64, 64), (2, 4), torch.float16, CUDA)
    assert reason == (None if fits else f"compute capability {capability} under (8, 0)")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 128])
def test_product_on_a_gpu(dtype, num_tokens):
    weight = torch.randn(128, 64, device="cuda").to(dtype)
    weight.view(-1, 4)[:, 1:3] = 0
    assert reason_against_semi_structured((128, 64), (2, 4), dtype, weight.device) is None
    activations = torch.randn(2, num_tokens, 64, device="cuda").to(dtype)
    output = F.linear(activations, semi_structured(weight))
    torch.testing.assert_close(output, F.linear(activations, weight), rtol=2e-2, atol=2e-2)
