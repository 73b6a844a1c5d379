"""Widgets for a live notebook: build a history from titles, see the prompt, the gate and the ranked candidates."""

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import numpy as np

from ilora.data.dataset import CANDIDATES
from ilora.language.recommender import LanguageRecommender
from ilora.study.sliders import question


class Player(widgets.VBox):
    """Choose a history (item ids, oldest first) and candidates; ranking, gate and prompt follow every change."""

    def __init__(self, recommender: LanguageRecommender, history: Sequence[int]) -> None:
        self.recommender, self.titles = recommender, recommender.prompts.titles
        wide, titles = widgets.Layout(width="100%"), [self.titles[item] for item in history]
        self.history = widgets.TagsInput(value=titles, allowed_tags=self.titles, allow_duplicates=False, layout=wide)
        self.draw = widgets.IntSlider(description="candidates, draw", min=0, max=99, style={"description_width": "8em"})
        self.question, self.prompt = widgets.HTML(), widgets.HTML()
        for control in (self.history, self.draw):
            control.observe(self.show, "value")
        label = widgets.Label("History, oldest first: type a title, Enter adds it, Backspace removes the last")
        super().__init__([label, self.history, self.draw, self.question, self.prompt], layout=wide)
        self.show()

    def row(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The history's last items and twenty other items; the first of these takes the place of the target."""
        items = [self.titles.index(title) for title in self.history.value]
        others = np.setdiff1d(np.arange(len(self.titles)), items)
        candidates = np.random.default_rng(self.draw.value).choice(others, CANDIDATES, replace=False)
        return np.array(items[-self.recommender.encoder.window :]), candidates, int(candidates[0])

    def show(self, _: object = None) -> None:
        """Rank the candidates and write the results into the widgets."""
        if not self.history.value:
            self.question.value, self.prompt.value = "Add a title to the history.", ""
            return
        history, candidates, _ = row = self.row()
        read, offered = ([self.titles[item] for item in items] for items in (history, candidates))
        shares = {"share of the twenty": self.recommender.score([row]).softmax(-1)[0].cpu().numpy()}
        gate = self.recommender.gate_weights([row]).numpy()[0]
        self.question.value = question("What comes next?", read, offered, shares, gate)
        tokens = self.recommender.prompts.write(history, candidates, hybrid=True)
        text = escape(self.recommender.prompts.tokenizer.decode(tokens))
        self.prompt.value = f'<pre style="white-space: pre-wrap">{text}</pre>'
