"""How `make lab` starts JupyterLab: the whole repository in its file browser, and notebook 00 open.

JupyterLab writes the version of its Python into a notebook as soon as it is opened, so that git saw a change in a
notebook that somebody only looked at. Here a notebook is shown with that version and stored without.
"""

import platform

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Notebooks(AsyncLargeFileManager):
    async def get(self, path, content=True, *args, **kwargs):
        model = await super().get(path, content, *args, **kwargs)
        if content and model["type"] == "notebook":
            model["content"]["metadata"].get("language_info", {})["version"] = platform.python_version()
        return model

    async def save(self, model, path=""):
        if model.get("type") == "notebook" and model.get("content"):
            model["content"]["metadata"].get("language_info", {}).pop("version", None)
        return await super().save(model, path)


c = get_config()  # noqa: F821  (Jupyter puts it there)
c.ServerApp.contents_manager_class = Notebooks
c.ServerApp.root_dir = "."
c.LabApp.default_url = "/lab/tree/notebooks/00_start_here.ipynb"
