from project.mail.models import Note

from pubsub_facade.contrib.django import subscriber


@subscriber("social.#", subscription="mail")
def write(post: dict[str, object]) -> None:
    Note.objects.create(text=str(post["text"]))
