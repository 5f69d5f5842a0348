"""The torch.library namespace that the ops are defined in."""

import torch

library = torch.library.Library("mergetune", "DEF")
