"""What advice is reckoned with and nobody can know: prices, speeds, how much is served. Each can be edited.

The defaults describe one rented NVIDIA A100 with 80 GB: 2,039 GB/s and 312 TFLOP/s in 16 bit are its data sheet's.
GPTQ's 4 hours for 175 B parameters on one such GPU are its paper's (Frantar et al., 2022, arXiv 2210.17323, abstract).
Prices are round numbers of the kind that clouds ask, not offers.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

HOUR = 3600.0


class Assumptions(BaseModel):
    """Prices in USD, speeds, and how the model is used."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    teacher_price: float = Field(2.0, ge=0.0, le=1000.0, description="USD for a million tokens of the teacher.")
    distill_tokens: float = Field(1.0, gt=0.0, le=1e5, description="Tokens to distill over, in billions.")
    gpu_rate: float = Field(2.0, ge=0.0, le=1000.0, description="USD for an hour of the GPU.")
    gptq_hours: float = Field(4.0, gt=0.0, le=1000.0, description="GPU hours of GPTQ for 175 B parameters.")
    served: float = Field(1000.0, gt=0.0, le=1e9, description="Tokens served in a month, in millions.")
    months: float = Field(12.0, gt=0.0, le=120.0, description="Months over which a price paid once is spread.")
    bandwidth: float = Field(2039.0, gt=0.0, le=1e5, description="GB/s at which the GPU reads its memory.")
    arithmetic: float = Field(312.0, gt=0.0, le=1e5, description="TFLOP/s of the GPU in 16 bit.")
    utilization: float = Field(0.4, gt=0.0, le=1.0, description="Share of these that training reaches.")
    batch: int = Field(1, ge=1, le=4096, description="Sequences that are written at a time now.")
    largest_batch: int = Field(16, ge=1, le=4096, description="Sequences that could be written at a time.")
    context: int = Field(2048, ge=16, le=1 << 20, description="Tokens of each sequence, prompt included.")

    def teacher_usd(self, tokens: float | None = None) -> float:
        """Price of the teacher's tokens: 500 B at 2 USD a million are 1 M USD."""
        return (self.distill_tokens * 1e9 if tokens is None else tokens) / 1e6 * self.teacher_price

    def quantize_hours(self, parameters: int) -> float:
        """GPU hours of GPTQ; its time is near proportional to the parameters."""
        return self.gptq_hours * parameters / 175e9

    def training_hours(self, parameters: int) -> float:
        """GPU hours in which a student of so many parameters reads the tokens: 6 operations for each of both."""
        speed = self.arithmetic * 1e12 * self.utilization
        return 6.0 * parameters * self.distill_tokens * 1e9 / speed / HOUR

    def served_usd(self, seconds: float, batch: int, paid_once: float = 0.0) -> float:
        """USD for a million served tokens, where a step for `batch` sequences takes so many seconds."""
        return self.gpu_rate / HOUR * seconds / batch * 1e6 + paid_once / (self.served * self.months)
