"""What training an LSTM on ragged sequences needs around the LSTM itself."""

from fastrnn.training.attention import LuongAttention
from fastrnn.training.beam import beam_decode
from fastrnn.training.collate import collate_ragged
from fastrnn.training.decoding import Decoded, greedy_decode
from fastrnn.training.initial_state import LearnedInitialState
from fastrnn.training.initialize import init_lstm_
from fastrnn.training.sampler import LengthBucketSampler
from fastrnn.training.scheduled_sampling import ScheduledSampling
from fastrnn.training.sequence_loss import sequence_loss
from fastrnn.training.standardize import Standardize
from fastrnn.training.tbptt import detach_state, tbptt_chunks
from fastrnn.training.teacher_forcing import teacher_forced_decode

__all__ = [
    "Decoded",
    "LearnedInitialState",
    "LengthBucketSampler",
    "LuongAttention",
    "ScheduledSampling",
    "Standardize",
    "beam_decode",
    "collate_ragged",
    "detach_state",
    "greedy_decode",
    "init_lstm_",
    "sequence_loss",
    "tbptt_chunks",
    "teacher_forced_decode",
]
