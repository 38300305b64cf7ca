"""epctl: train Mixture-of-Experts and vision-language models on DeepSpeed, one command each."""

__version__ = "0.1.0"
