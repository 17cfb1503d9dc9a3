from django.apps import AppConfig


class SocialConfig(AppConfig):
    name = "project.social"
    label = "social"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from project.social.models import Profile

        from pubsub_facade.contrib.django import publish_model_changes

        publish_model_changes(Profile, "social.profile", fields=["name"])
