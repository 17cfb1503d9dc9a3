from django.db import models


class Post(models.Model):
    author = models.IntegerField()
    text = models.TextField()


class Profile(models.Model):
    name = models.CharField(max_length=100)
    secret = models.CharField(max_length=100, default="s3cret")
    born = models.DateField(null=True)


class Count(models.Model):
    """What the analytics handler counts."""

    author = models.IntegerField(unique=True)
    posts = models.IntegerField(default=0)
