"""The Django project that the tests run; its database and its broker come from the environment."""

import os
from urllib.parse import urlsplit

SECRET_KEY = "only-for-tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "project.urls"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "pubsub_facade.contrib.django",
    "project.social.apps.SocialConfig",
    *os.environ.get("MORE_APPS", "").split(),
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


def _database(url: str, more: str = "") -> dict[str, object]:
    if url.startswith("sqlite:///"):
        name = url.removeprefix("sqlite:///")
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": name,
            "OPTIONS": {"timeout": 30},
            "TEST": {"NAME": name + ".test"},
        }
    parts = urlsplit(url)
    engine = "postgresql" if parts.scheme.startswith("postgresql") else "mysql"
    return {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": parts.path.lstrip("/"),
        "USER": parts.username,
        "PASSWORD": parts.password,
        "HOST": parts.hostname,
        "PORT": parts.port,
        "CONN_MAX_AGE": int(os.environ.get("CONN_MAX_AGE", "60")),
        "TEST": {"NAME": os.environ.get("TEST_DATABASE", "test_pubsub") + more},
    }


if os.environ["DATABASE_URL"].startswith("mysql"):
    import pymysql

    pymysql.version_info = (2, 2, 4, "final", 0)  # what Django asks of mysqlclient
    pymysql.install_as_MySQLdb()

DATABASES = {"default": _database(os.environ["DATABASE_URL"])}
if "OTHER_DATABASE_URL" in os.environ:
    DATABASES["other"] = _database(os.environ["OTHER_DATABASE_URL"], "_other")

if "SOCIAL_PUBSUB" in os.environ:
    import json

    PUBSUB = json.loads(os.environ["SOCIAL_PUBSUB"])

if "DJANGO_WATCHED" in os.environ:
    import importlib

    importlib.import_module(os.environ["DJANGO_WATCHED"])
