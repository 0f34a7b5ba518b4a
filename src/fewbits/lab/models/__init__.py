"""Networks by name: ours, torchvision's, timm's, or the user's own."""

from ._build import build as build
from ._build import parameter_count as parameter_count
