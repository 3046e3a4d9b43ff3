"""Whether a pair of models and their data fit, before a run: `sra doctor`."""

from sra.doctor.checks import Finding
from sra.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "Finding", "diagnose"]
