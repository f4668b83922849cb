"""AdamATan2 and sparse sign-SGD by their formulas."""

from __future__ import annotations

from pathlib import Path

import torch

from tafkir.train.optim import AdamATan2, SparseSignSgd
from tafkir.train.state import load_state, save_state


def test_adam_atan2_by_its_formula() -> None:
    """Two steps in float64 by hand: the quotient of the corrected moments goes through atan2."""
    start, grads = torch.tensor([0.5, -2.0, 0.0]), (torch.tensor([0.1, -3.0, 0.0]), torch.tensor([1e-9, 2.0, 0.0]))
    param = torch.nn.Parameter(start.clone())
    optimizer = AdamATan2([param], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    expected, m, v = start.double(), torch.zeros(3).double(), torch.zeros(3).double()
    for step, grad in enumerate(grads, start=1):
        param.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
        update = torch.atan2(m / (1 - 0.9**step), (v / (1 - 0.95**step)).sqrt())
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * update
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert param[2] == 0, "atan2(0, 0) is 0"


def test_adam_atan2_resumes(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2, bias=False)
    optimizer = AdamATan2(module.parameters(), lr=0.1)

    def step() -> None:
        module.weight.grad = torch.ones_like(module.weight) * module.weight.detach()
        optimizer.step()

    step()
    path = save_state(tmp_path, module, [optimizer], 1)
    step()
    wanted = module.weight.detach().clone()
    optimizer.state.clear()
    assert load_state(path, module, [optimizer]) == 1
    step()
    assert torch.equal(module.weight, wanted)


def test_sparse_sign_sgd_touches_rows_by_the_sign_of_their_summed_gradient() -> None:
    table = torch.arange(8.0).view(4, 2)
    touched: list[tuple[torch.Tensor, torch.Tensor]] = []
    optimizer = SparseSignSgd(table, touched, lr=0.1, weight_decay=0.5)
    for rows, grads in (([1, 3, 1], [[2.0, -1.0], [0.0, 5.0], [-3.0, -1.0]]), ([3], [[0.0, -9.0]])):
        copies = table[rows].requires_grad_()
        copies.grad = torch.tensor(grads)
        touched.append((torch.tensor(rows), copies))
    optimizer.step()
    assert not touched
    kept = 0.95
    expected = torch.tensor([[0.0, 1.0], [2 * kept + 0.1, 3 * kept + 0.1], [4.0, 5.0], [6 * kept, 7 * kept + 0.1]])
    torch.testing.assert_close(table, expected)
    optimizer.step()
    torch.testing.assert_close(table, expected)
