# The former name of train_gpt2_30m_sophiag_spectral.py, the spectral step: the same settings, and the former out_dir.
#   python train_sophiag.py config/train_gpt2_30m_sophiag_tuned.py

from pathlib import Path as _Path

exec(_Path(__file__).with_name("train_gpt2_30m_sophiag_spectral.py").read_text(encoding="utf-8"))
out_dir = "out/gpt2_30m_sophiag_tuned"
