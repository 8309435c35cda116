import pytest
import torch
from hypothesis import settings

import glai_lightning  # noqa: F401  (first: it lets torchvision be imported beside a CPU-only torch)

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
