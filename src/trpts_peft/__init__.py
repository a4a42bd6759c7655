"""Task-Relevant Parameter and Token Selection (TR-PTS) for PEFT. Importing it registers the method."""

from . import functional
from .calibration import calibrate
from .callbacks import TRPTSCallback
from .config import TRPTSConfig
from .cost import estimate_cost
from .fisher import FisherScores
from .keep_rate import set_keep_rate
from .measurement import estimate_fisher
from .model import TRPTSModel
from .plots import plot_layer_importance, plot_overlap, plot_tokens
from .record import record_tokens
from .registration import register as _register
from .selection import Selection, select
from .vit import apply_token_selection, set_token_selection

__version__ = "0.1.0"
# fmt: off
__all__ = [
    "FisherScores", "Selection", "TRPTSCallback", "TRPTSConfig", "TRPTSModel", "apply_token_selection", "calibrate",
    "estimate_cost", "estimate_fisher", "functional", "plot_layer_importance", "plot_overlap", "plot_tokens",
    "record_tokens", "select", "set_keep_rate", "set_token_selection",
]
# fmt: on

_register()
