"""The matrices are small: a second thread brings nothing, and costs a lot on a busy machine."""

import torch

torch.set_num_threads(1)
