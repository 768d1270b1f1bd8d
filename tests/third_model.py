"A third five-MOS model, whole, in one file: it sees nothing but the mean colour of a clip."
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qualivision.models.five_mos import CauseHeads, FiveMos, ModelConfig, MosPredictor
from qualivision.models.registry import ModelEntry, Start


@dataclass(frozen=True)
class ColourConfig(ModelConfig):
    "Every size of it."
    frames: int = 4
    size: int = 32
    width: int = 16
    text_dim: int = 384
    causes: tuple = ()
    attributes: tuple = ()


class ColourMos(FiveMos):
    "Mean colours, times the prompt, as five MOS."
    CONFIG, FEATURES, VIDEO, frozen = ColourConfig, "colour_features", ("see.",), False
    BODY = ("see.", "read.", "mos_predictor.", "causes.")

    def __init__(self, config=ColourConfig(), text_encoder=None):
        super().__init__(config, text_encoder)
        self.see, self.read = nn.Linear(6, config.width), nn.Linear(config.text_dim, config.width)
        self.mos_predictor = MosPredictor(config.width, 0.)
        if self.asks: self.causes = CauseHeads(config.causes, config.attributes, config.width, config.width, config.text_dim)

    def frozen_key(self): return "nothing is frozen"

    def look(self, frames):                                                  # (B,3,T,H,W)
        x = frames.float() / (255 if frames.dtype == torch.uint8 else 1)
        return {"colour": torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)}                 # (B,6)

    def encode_video(self, frames):
        known = self.prefix(frames) if isinstance(frames, Tensor) else frames
        features = self.see(known["colour"])                                 # (B,W)
        return self.with_causes(dict(features=features, tokens=features.unsqueeze(1)))         # (B,W), (B,1,W)

    def score_under(self, video, text):
        fused = video["features"] * (1 + self.read(text).tanh())             # (B,W)
        raw = self.mos_predictor(fused)                                      # (B,5)
        return raw + self.causes(video, text) if self.asks else raw, fused, None


ENTRY = ModelEntry("colours", "mean-colours", "Mean colours", "◁▷", "mean", ColourMos, configs={"colours_tiny": ColourConfig()},
                   build=lambda config, pretrained=None: Start(ColourMos(config)))
