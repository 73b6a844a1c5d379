"""Language models as recommenders: base models, prompts, the recommender around them, and its tuning."""

from ilora.language.adapted_layers import adapter_config
from ilora.language.base_models import Projector, load_language_model
from ilora.language.prompts import ITEM_TOKEN, NO_LABEL, PROMPT, Prompts, prompt_text, read_answer, wording
from ilora.language.recommender import LanguageRecommender
from ilora.language.tuning import AdapterSettings, tune, tuning_arguments, untuned
