"""The torch.library namespace of the ops."""

import torch

library = torch.library.Library("mergetune", "DEF")
