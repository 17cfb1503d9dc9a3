from django.db import models
from project.social.models import Post


class Letter(models.Model):
    """One field of each kind whose value is no plain JSON."""

    about = models.ForeignKey(Post, models.CASCADE)
    data = models.JSONField(default=dict)
    stamp = models.BinaryField(default=b"\x00\xff")
    attached = models.FileField(default="attached.txt")
    cost = models.DecimalField(max_digits=6, decimal_places=2, default="1.20")
    sent = models.DateTimeField(null=True)
    copies = models.IntegerField(default=1)

    @property
    def total(self) -> float:
        return float(self.cost) * self.copies

    @property
    def envelope(self) -> object:
        return object()


class Draft(models.Model):
    text = models.TextField()


class Note(models.Model):
    text = models.TextField()
