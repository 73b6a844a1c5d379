"""Evaluation of systems: outcomes per question, metrics, and 95% intervals."""

from ilora.evaluation.metrics import compute_metrics, difference, expected_hit_ratio, hit_ratios, interval
from ilora.evaluation.outcomes import NO_ANSWER, OPEN, System, evaluate, outcomes_from_scores, question_ids
