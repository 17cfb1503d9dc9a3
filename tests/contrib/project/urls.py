from django.contrib import admin
from django.urls import path
from project.social import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("post/", views.post),
    path("apost/", views.apost),
    path("outbox/", views.outbox),
]
