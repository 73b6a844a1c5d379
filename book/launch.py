"""Chapters get launch buttons once _config.yml names the repository; without its address the theme would stop."""

from sphinx.application import Sphinx
from sphinx.config import Config


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", drop_buttons_without_address)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def drop_buttons_without_address(app: Sphinx, config: Config) -> None:
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)
