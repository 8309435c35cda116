"""Statistics are exact for every dtype, and constant columns do no harm."""

import pytest
import torch
from sklearn.preprocessing import StandardScaler

from glai_lightning.datamodules.arrays import Standardisation


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64]
)
def test_it_agrees_with_scikit_learn_in_float64(dtype):
    inputs = (torch.randn(3000, 7, generator=torch.Generator().manual_seed(0)) * 5 + 20).to(dtype)
    expected = StandardScaler().fit_transform(inputs.double().numpy())
    outputs = Standardisation.fit(inputs)(inputs)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, torch.from_numpy(expected).float())


def test_blocks_make_no_difference(monkeypatch):
    inputs = torch.randn(100, 3)
    whole = Standardisation.fit(inputs)(inputs)
    monkeypatch.setattr("glai_lightning.datamodules.arrays._ELEMENTS_PER_BLOCK", 20)
    torch.testing.assert_close(Standardisation.fit(inputs)(inputs), whole)


def test_a_large_offset_costs_no_precision():
    deviations = torch.randn(1000, 1, dtype=torch.float64)
    timestamps = 1.7e9 + deviations
    outputs = Standardisation.fit(timestamps)(timestamps)
    expected = (deviations - deviations.mean()) / deviations.std(correction=0)
    torch.testing.assert_close(outputs, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -3.7])
def test_a_constant_column_becomes_zero(value):
    inputs = torch.full((1003, 2), value)
    standardise = Standardisation.fit(inputs)
    assert standardise.scale.tolist() == [1.0, 1.0]
    assert standardise(inputs).abs().max() <= 1e-9 * max(1.0, abs(value))


def test_columns_beyond_the_range_of_float32_squares_are_standardised():
    inputs = torch.randn(100, 1) * torch.tensor([[1e-30, 1e30]])
    outputs = Standardisation.fit(inputs)(inputs)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(2))
