"""Evaluation of systems: outcomes per question, metrics, and 95% intervals."""
# ruff: noqa: F401

from ilora.evaluation.intervals import difference, interval, resampled_means
from ilora.evaluation.metrics import check_scores, compute_metrics, expected_hit_ratio, hit_ratios
from ilora.evaluation.outcomes import NO_ANSWER, System, evaluate, outcomes_from_scores, question_ids
