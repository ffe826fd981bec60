"""Large CPU tensors in huge pages, where the system has them and where it has not."""

import mmap

import pytest
import torch

from alp_kernels import memory

LARGE = (1 << 12, 1 << 11)  # 16 MiB in 16 bits


class Refusing(mmap.mmap):
    """Memory of a kernel that was built without huge pages."""

    def madvise(self, *args):
        raise OSError(22, "Invalid argument")


@pytest.fixture(params=["huge pages", "refused", "no such advice"])
def system(request, monkeypatch):
    if request.param == "refused":
        monkeypatch.setattr(mmap, "mmap", Refusing)
    if request.param == "no such advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), LARGE])
def test_zeros_and_empty_are_tensors_as_any(system, shape, dtype):
    zeros, empty = memory.zeros(*shape, dtype=dtype), memory.empty(*shape, like=torch.ones(1, dtype=dtype))
    assert not zeros.any()
    for tensor in (zeros, empty):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu
        tensor.fill_(2).mul_(3)
        assert (tensor == 6).all()
    assert memory.empty(*shape, like=zeros, dtype=torch.float64).dtype == torch.float64


def test_a_parameter_may_keep_one_as_its_gradient():
    weight = torch.nn.Parameter(torch.ones(LARGE))
    weight.grad = memory.zeros(*LARGE, dtype=torch.float32).fill_(1)
    weight.grad += 1
    torch.optim.SGD([weight], lr=0.25).step()
    assert (weight == 0.5).all()
