"""All facts about the package stand in settings.ini; this file only hands them to setuptools."""
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

# a package index shows the README away from the repository, where relative links lead nowhere
readme, url = (here/"README.md").read_text(encoding="utf-8"), cfg["git_url"]
readme = re.sub(r"(!\[[^\]]*\]\()(nbs/)", rf"\1{url}/raw/main/\2", readme)
readme = readme.replace("](nbs/", f"]({url}/blob/main/nbs/")

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license_expression="Apache-2.0",
    # assets has no __init__.py, but setuptools counts a folder of data as a package, too, and warns if it isn't named
    packages=[*find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), cfg["lib_path"] + ".assets"],
    package_data={cfg["lib_path"] + ".assets": ["*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name.removesuffix("_requirements"): cfg[name].split() for name in cfg
                    if name.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=readme, long_description_content_type="text/markdown",
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Developers", "Intended Audience :: Education",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    zip_safe=False,
)
