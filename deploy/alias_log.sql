-- Every move of an alias is a row of alias_log, written in the transaction that moves it. server_app.py runs this file
-- at each start, and tells the database who asks. PostgreSQL 14 or later.
CREATE TABLE IF NOT EXISTS alias_log (
    moved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    moved_by text NOT NULL,
    registered_model text NOT NULL,
    alias text NOT NULL,
    from_version integer, -- NULL: the alias is new
    to_version integer -- NULL: the alias was deleted
);

CREATE OR REPLACE FUNCTION log_alias() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    -- Who does not come through the server is known as the user of the database.
    who text := coalesce(nullif(current_setting('mlflow.user', true), ''), 'database user ' || session_user);
BEGIN
    IF TG_OP = 'UPDATE' AND (NEW.name, NEW.alias) = (OLD.name, OLD.alias) THEN
        IF NEW.version <> OLD.version THEN
            INSERT INTO alias_log VALUES (DEFAULT, who, NEW.name, NEW.alias, OLD.version, NEW.version);
        END IF;
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO alias_log VALUES (DEFAULT, who, OLD.name, OLD.alias, OLD.version, NULL);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO alias_log VALUES (DEFAULT, who, NEW.name, NEW.alias, NULL, NEW.version);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER log_alias AFTER INSERT OR UPDATE OR DELETE ON registered_model_aliases
    FOR EACH ROW EXECUTE FUNCTION log_alias();

CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'alias_log is append-only';
END $$;

CREATE OR REPLACE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON alias_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
