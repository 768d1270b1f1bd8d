"A third five-MOS model, whole, in one file: it sees nothing but the mean colour of a clip."
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qualivision.models.five_mos import FiveMos, ModelConfig, MosPredictor, match_logits, on_scale, repeated
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
    CONFIG, VIDEO, frozen = ColourConfig, ("see.",), False

    def __init__(self, config=ColourConfig(), text_encoder=None):
        super().__init__(config, text_encoder)
        self.see, self.read = nn.Linear(6, config.width), nn.Linear(config.text_dim, config.width)
        self.mos_predictor = MosPredictor(config.width, 0.)

    def frozen_key(self): return "nothing is frozen"

    def prefix(self, frames):                                                # (B,3,T,H,W)
        x = frames.float() / (255 if frames.dtype == torch.uint8 else 1)
        return {"colour": torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)}                 # (B,6)

    def encode_video(self, frames):
        known = self.prefix(frames) if isinstance(frames, Tensor) else frames
        features = self.see(known["colour"])                                 # (B,W)
        return dict(features=features, tokens=features.unsqueeze(1))         # (B,W), (B,1,W)

    def score_under(self, video, text):
        fused = video["features"] * (1 + self.read(text).tanh())             # (B,W)
        return self.mos_predictor(fused), fused, None                        # (B,5), (B,W)

    def forward(self, frames, text, others=None):
        text = self.embed(text, frames)                                      # (B,D)
        video = self.encode_video(frames)
        raw, fused, _ = self.score_under(video, text)                        # (B,5), (B,W)
        out = dict(mos=on_scale(raw), colour_features=video["features"], text_features=text, fused_features=fused)
        if others is not None:                                               # (B,K,D)
            other, _, _ = self.score_under(repeated(video, others.shape[1]), others.flatten(0, 1))
            out["match_logits"] = match_logits(raw, other)                   # (B,1+K)
        return out


ENTRY = ModelEntry("colours", "mean-colours", "Mean colours", "◁▷", "mean", ColourMos, ColourConfig, configs={"colours_tiny": ColourConfig()},
                   default="colours_tiny", starts=("random",), build=lambda config, pretrained=None: Start(ColourMos(config)))
