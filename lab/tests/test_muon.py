"""Muon, by singular values."""
import pytest
import torch

from lab.muon import Muon


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (5, 3, 4)], ids=str)
def test_a_step_of_muon_has_the_singular_vectors_of_the_gradient_and_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape))
    before = matrix.detach().clone()
    optimizer = Muon([matrix], lr=0.1, weight_decay=0.0)
    average = torch.zeros(shape)
    for gradient in torch.randn(2, *shape):
        matrix.grad = gradient
        optimizer.step()
        change = (before - matrix.detach()) / (0.1 * max(1, shape[-2] / shape[-1]) ** 0.5)
        before = matrix.detach().clone()
        average = 0.95 * average + gradient
        ahead = gradient + 0.95 * average               # Nesterov's momentum
        U, _, Vh = torch.linalg.svd(ahead, full_matrices=False)
        in_its_vectors = U.mT @ change @ Vh.mT
        values = in_its_vectors.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(in_its_vectors, torch.diag_embed(values), atol=1e-4, rtol=0)
        torch.testing.assert_close(change, U @ torch.diag_embed(values) @ Vh, atol=1e-4, rtol=0)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_shrinks_the_weights_by_their_decay():
    matrix = torch.nn.Parameter(torch.eye(3))
    matrix.grad = torch.zeros(3, 3)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), 0.95 * torch.eye(3))


def test_a_matrix_moves_as_far_in_a_stack_as_alone():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 4, 5))
    alone = torch.nn.Parameter(stack[1].detach().clone())
    stack.grad = torch.randn(3, 4, 5)
    alone.grad = stack.grad[1].clone()
    Muon([stack, alone], lr=0.1).step()
    torch.testing.assert_close(stack[1].detach(), alone.detach())
