"""What training an LSTM on ragged sequences needs around the LSTM itself."""

from fastrnn.training.collate import collate_ragged
from fastrnn.training.standardize import Standardize

__all__ = ["Standardize", "collate_ragged"]
