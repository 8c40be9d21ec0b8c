-- One database for runs and models, one for users and permissions. The first is made by the image, from POSTGRES_USER.
CREATE DATABASE mlflow_auth;
