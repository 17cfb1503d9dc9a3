"""The pages of the social network."""

from django.urls import path
from social import views

urlpatterns = [
    path("", views.home, name="home"),
    path("feed/", views.feed, name="feed"),
    path("analytics/", views.analytics, name="analytics"),
    path("analytics/counts/", views.counts, name="counts"),
]
